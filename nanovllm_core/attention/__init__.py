"""Attention backends behind one interface, chosen by name.

A backend is a file with a subclass of `AttentionBackend` and a line in `_MODULES`.
"""

import importlib

import torch

from nanovllm_core.attention.base import AttentionBackend
from nanovllm_core.config import ModelConfig

__all__ = ["AttentionBackend", "BackendError", "backend_names", "create_backend"]

# name: (module, class). Imported on demand: a backend's libraries need not be installed.
_MODULES = {
    "torch": ("nanovllm_core.attention.torch_backend", "TorchBackend"),
    "triton": ("nanovllm_core.attention.triton_backend", "TritonBackend"),
    "flash_attn": ("nanovllm_core.attention.flash_attn_backend", "FlashAttnBackend"),
    "flash_attn_3": ("nanovllm_core.attention.flash_attn_3_backend", "FlashAttn3Backend"),
}


class BackendError(ValueError):
    """There is no such backend, or it cannot run here; the message says what to choose instead."""


def backend_names() -> tuple[str, ...]:
    """Names that `create_backend` knows."""
    return tuple(_MODULES)


def create_backend(name: str, config: ModelConfig, device: torch.device) -> AttentionBackend:
    """Creates the backend called `name`.

    Raises:
        BackendError: the name is unknown, or a library that the backend needs is not installed.
    """
    if name not in _MODULES:
        raise BackendError(
            f"there is no attention backend {name!r}; choose one of {', '.join(_MODULES)}"
        )
    module_name, class_name = _MODULES[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise BackendError(
            f"attention backend {name!r} cannot be loaded ({error}); install what it needs or "
            "choose 'torch'"
        ) from error
    backend: AttentionBackend = getattr(module, class_name)(config, device)
    return backend
