from pathlib import Path

import pytest

from scheduler_service.tokenizer import Tokenizer
from tests.checkpoints import make_checkpoint
from tests.security.pki import Pki


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """An authority whose files are gone after the test."""
    return Pki(tmp_path / "pki")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory whose tokenizer has one token per byte."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-qwen3")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)
