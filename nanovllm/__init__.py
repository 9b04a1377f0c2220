"""Client library of nanovllm-grpc: remote clients, and models as Python objects.

Names are loaded on first use, so that a service that needs one module does not pay for all.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.aio import AsyncClient, AsyncDeltaStream
    from nanovllm.client import Client, DeltaStream
    from nanovllm.errors import (
        AuthenticationError,
        DeadlineExceededError,
        DuplicateRequestError,
        FieldViolation,
        InvalidRequestError,
        NanovllmError,
        OverloadedError,
        RequestCancelledError,
        RequestTooLargeError,
        ServerError,
        UnavailableError,
    )
    from nanovllm.llm import LLM
    from nanovllm.model_store import ModelNotFoundError
    from nanovllm.outputs import (
        Completion,
        Delta,
        FinishReason,
        RequestOutput,
        TokenLogprobs,
        Usage,
    )
    from nanovllm.requests import Chat
    from nanovllm.resume import ResumePolicy
    from nanovllm.sampling_params import SamplingParams
    from nanovllm.server_info import ExecutorSummary, Health, ModelInfo, ServerStatus
    from nanovllm.services import LocalServices, ServiceProcess, ServiceStartError
    from nanovllm.tls import TlsConfig, TlsError

_MODULES = {
    "aio": ("AsyncClient", "AsyncDeltaStream"),
    "client": ("Client", "DeltaStream"),
    "errors": (
        "AuthenticationError",
        "DeadlineExceededError",
        "DuplicateRequestError",
        "FieldViolation",
        "InvalidRequestError",
        "NanovllmError",
        "OverloadedError",
        "RequestCancelledError",
        "RequestTooLargeError",
        "ServerError",
        "UnavailableError",
    ),
    "llm": ("LLM",),
    "model_store": ("ModelNotFoundError",),
    "outputs": (
        "Completion",
        "Delta",
        "FinishReason",
        "RequestOutput",
        "TokenLogprobs",
        "Usage",
    ),
    "requests": ("Chat",),
    "resume": ("ResumePolicy",),
    "sampling_params": ("SamplingParams",),
    "server_info": ("ExecutorSummary", "Health", "ModelInfo", "ServerStatus"),
    "services": ("LocalServices", "ServiceProcess", "ServiceStartError"),
    "tls": ("TlsConfig", "TlsError"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncDeltaStream",
    "AuthenticationError",
    "Chat",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "Delta",
    "DeltaStream",
    "DuplicateRequestError",
    "ExecutorSummary",
    "FieldViolation",
    "FinishReason",
    "Health",
    "InvalidRequestError",
    "LocalServices",
    "ModelInfo",
    "ModelNotFoundError",
    "NanovllmError",
    "OverloadedError",
    "RequestCancelledError",
    "RequestOutput",
    "RequestTooLargeError",
    "ResumePolicy",
    "SamplingParams",
    "ServerError",
    "ServerStatus",
    "ServiceProcess",
    "ServiceStartError",
    "TlsConfig",
    "TlsError",
    "TokenLogprobs",
    "UnavailableError",
    "Usage",
    "__version__",
]

try:
    __version__ = metadata.version("nanovllm-grpc")
except metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0.0.0+source"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
