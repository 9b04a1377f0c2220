from pathlib import Path

import pytest
from hypothesis import settings

from scheduler_service.tokenizer import Tokenizer
from tests.checkpoints import make_checkpoint

# The machine may be busy; how long an example takes says nothing here.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory whose tokenizer has one token per byte."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-qwen3")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer(checkpoint)
