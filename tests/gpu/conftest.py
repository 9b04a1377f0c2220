"""Tiny checkpoints for the tests on a GPU, as files and in transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint
from tests.gpu.support import Oracle

#: Long enough for requests that are still running when a test interferes.
MAX_MODEL_LEN = 4096
#: flash-attn is built for heads of 64 and 128 only.
HEAD_DIM = 64


@dataclass(frozen=True, slots=True)
class Tiny:
    """A tiny random checkpoint; `oracle` runs it in float32 on the CPU."""

    checkpoint: Path
    oracle: Oracle


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Tiny]:
    """Makes the checkpoint of an architecture with weights of a type, once."""

    @cache
    def make(architecture: str, dtype: str) -> Tiny:
        directory = tmp_path_factory.mktemp("models") / f"tiny-{architecture}-{dtype}"
        # Qwen2 has no head_dim of its own: four heads share the hidden size.
        shape = {"hidden_size": 4 * HEAD_DIM} if architecture == "qwen2" else {"head_dim": HEAD_DIM}
        make_checkpoint(
            directory, architecture, max_position_embeddings=MAX_MODEL_LEN, dtype=dtype, **shape
        )
        # The weights were rounded to `dtype`; from there on every step is in float32.
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        return Tiny(directory, Oracle(model.eval()))

    return make
