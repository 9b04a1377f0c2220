from pathlib import Path

import pytest

from tests.security.pki import Pki


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    """An authority whose files are gone after the test."""
    return Pki(tmp_path / "pki")
