"""Settings of the whole suite."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from scheduler_service.text.tokenizer import Tokenizer

# Before torch is imported, here and in child processes. The models are tiny, and the threads of
# several processes would spend their time waiting for each other on a machine with few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory whose tokenizer has one token per byte."""
    # Not at the top, where it would import torch first.
    from tests.checkpoints import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-qwen3")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> "Tokenizer":
    """The tokenizer of that directory."""
    from scheduler_service.text.tokenizer import Tokenizer

    return Tokenizer(checkpoint)
