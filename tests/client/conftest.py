from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.fake_server import FakeServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    fake = FakeServer.start(f"unix:{tmp_path}/fake.sock")
    yield fake
    fake.stop()
