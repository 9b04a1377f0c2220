import threading
from collections.abc import Iterator

import pytest
from hypothesis import settings

from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler_service.serving import LIMIT_S

# The machine may be busy; how long an example takes says nothing here.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture
def slow_tokenizer(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[threading.Event]:
    """Texts are not tokenized before the event is set."""
    go_on = threading.Event()
    encode = tokenizer.encode

    def wait_and_encode(text: str, **options) -> list[int]:
        go_on.wait(LIMIT_S)
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", wait_and_encode)
    yield go_on
    go_on.set()
