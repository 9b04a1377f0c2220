"""One scheduler over several executors, as real processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nanovllm import Client, ServiceProcess
from tests.e2e.support import CPU, LIMIT_S


class Stack:
    """A scheduler and executors on unix sockets of a folder, all with metrics."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        names: Sequence[str],
        known: Sequence[str],
    ) -> None:
        self._model = model
        self._folder = folder
        self.executors = {
            name: self._process(
                "executor_service",
                name,
                *CPU,
                *("--num-kv-blocks", "512", "--block-size", "16", "--max-num-seqs", "32"),
                *("--max-num-batched-tokens", "256"),
            )
            for name in names
        }
        addresses = ",".join(map(self.address, known))
        self.scheduler = self._process(
            "scheduler_service",
            "scheduler",
            *("--executor", addresses, "--admin-listen", self.address("admin")),
        )

    def address(self, name: str) -> str:
        """Where the process of this name listens; "admin": the scheduler's admin service."""
        return f"unix:{self._folder}/{name}.sock"

    @property
    def client(self) -> Client:
        """A new client of the scheduler."""
        return Client(self.address("scheduler"))

    @property
    def processes(self) -> list[ServiceProcess]:
        """All of them, the scheduler last."""
        return [*self.executors.values(), self.scheduler]

    def log(self, name: str) -> str:
        """What the process of this name has logged."""
        return (self._folder / f"{name}.log").read_text()

    def _process(self, module: str, name: str, *arguments: str) -> ServiceProcess:
        return ServiceProcess(
            module,
            [
                *("--model", str(self._model), "--listen", self.address(name)),
                *("--metrics-port", "0", *arguments),
            ],
            log_path=self._folder / f"{name}.log",
        )


@contextmanager
def running_stack(
    model: Path,
    folder: Path,
    names: Sequence[str],
    *,
    known: Sequence[str] | None = None,
) -> Iterator[Stack]:
    """Executors of these names and a scheduler that knows all of them, or only `known`.

    Fails the test if any of them logs a traceback.
    """
    stack = Stack(model, folder, names, names if known is None else known)
    try:
        for process in stack.processes:
            process.start()
        for process in stack.processes:
            process.wait_until_ready(4 * LIMIT_S)
        yield stack
    finally:
        for process in reversed(stack.processes):
            process.stop(LIMIT_S)
    for name in (*names, "scheduler"):
        assert "Traceback" not in (text := stack.log(name)), text
