"""Files that change under a running process are taken up, and broken ones are not."""

import logging
import os
from pathlib import Path

import pytest

from nanovllm.reloading import Reloading
from nanovllm.tls import read_identity
from tests.security.pki import Pki


def test_changed_files_are_loaded_once_and_broken_ones_not_at_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "number"
    path.write_text("1")
    loads: list[str] = []

    def load() -> int:
        loads.append(path.read_text())
        return int(loads[-1])

    number = Reloading((path,), load)
    assert number.get() == number.get() == 1
    replace(path, "22")
    assert number.get() == number.get() == 22
    with caplog.at_level(logging.WARNING, logger="nanovllm.reloading"):
        replace(path, "broken")
        assert number.get() == number.get() == 22
    lines = [record for record in caplog.records if record.name == "nanovllm.reloading"]
    assert len(lines) == 1
    assert "stays in use" in lines[0].getMessage()
    replace(path, "3")
    assert number.get() == 3
    assert loads == ["1", "22", "broken", "3"]


def test_a_file_that_vanishes_leaves_what_was_loaded_in_use(pki: Pki):
    identity = pki.issue("server")
    pair = Reloading(
        (identity.cert, identity.key), lambda: read_identity(identity.cert, identity.key)
    )
    first = pair.get()
    identity.key.unlink()
    assert pair.get() is first
    pki.issue("server")
    assert pair.get() != first


def replace(path: Path, text: str) -> None:
    """As tools do that renew certificates: a new file takes the name."""
    new = path.with_name("new")
    new.write_text(text)
    os.replace(new, path)
