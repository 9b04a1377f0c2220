"""What signals do to a service, seen from outside."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT_S = 30.0
SCRIPT = """
import sys, threading
from nanovllm.stop_signals import StopSignals

stop = threading.Event()
signals = StopSignals(sys.argv[1], stop.set)
if sys.argv[2] == "up":
    signals.service_is_up()
print("ready", flush=True)
stop.wait()
print("drains", flush=True)
threading.Event().wait()
"""


class Child:
    def __init__(self, path: Path, state: str) -> None:
        path.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, f"unix:{path}", state],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Exit status and standard error."""
        _, errors = self._process.communicate(timeout=LIMIT_S)
        return self._process.returncode, errors

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    children = []

    def run(state: str) -> Child:
        child = Child(tmp_path / "service.sock", state)
        children.append(child)
        return child

    yield run
    for child in children:
        child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_ends_the_process_and_removes_its_socket(
    start, tmp_path: Path, number: signal.Signals
):
    child = start("starting")
    child.send(number)
    assert child.end() == (128 + number, f"ended at once by {number.name}\n")
    assert not (tmp_path / "service.sock").exists()


def test_the_first_signal_asks_and_the_second_enforces(start, tmp_path: Path):
    child = start("up")
    child.send(signal.SIGINT)
    assert child.line() == "drains"
    assert (tmp_path / "service.sock").exists()
    child.send(signal.SIGTERM)
    assert child.end()[0] == 128 + signal.SIGTERM
    assert not (tmp_path / "service.sock").exists()
