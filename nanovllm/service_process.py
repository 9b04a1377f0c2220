"""One service as a supervised child process."""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

READY_PREFIX = "ready: listening on "
METRICS_PREFIX = "metrics: "
#: Lines of stderr that an error quotes.
TAIL_LINES = 12
#: How long the pipes may take to drain after the process ended.
DRAIN_S = 2.0


class ServiceStartError(RuntimeError):
    """A service ended, or ran into the time limit, before it was ready."""


class ServiceProcess:
    """Starts `python -m MODULE ARGUMENTS`, learns its address from stdout, and stops it.

    A service prints `metrics: URL` (if it serves metrics) and then `ready: listening on ADDRESS`.
    The child ends with this process, even if this process is killed. Use it as a context manager,
    or call `stop`.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        log_path: Path | None = None,
        on_settled: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepares the process; nothing runs before `start`.

        Args:
            module: The module to run, also the name in errors.
            arguments: Its command line arguments.
            env: Variables added to this process's environment.
            log_path: File that the child's stderr is appended to; default: this process's stderr.
            on_settled: Called from another thread when the child is ready or has closed its
                stdout; called once per start.
        """
        self.module = module
        self.arguments = tuple(arguments)
        self._env = dict(env or {})
        self._log_path = log_path
        self._on_settled = on_settled
        self._process: subprocess.Popen[str] | None = None
        self._readers: list[threading.Thread] = []
        self._settled = threading.Event()
        self._started_at_s = 0.0
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._address: str | None = None
        self._metrics_url: str | None = None

    @property
    def address(self) -> str:
        """The address that the service listens on.

        Raises:
            RuntimeError: The service has not said that it is ready.
        """
        if self._address is None:
            raise RuntimeError(f"{self.module} is not ready; call wait_until_ready() first")
        return self._address

    @property
    def metrics_url(self) -> str | None:
        """URL of the metrics page, or None if the service has none."""
        return self._metrics_url

    @property
    def pid(self) -> int:
        """The process id.

        Raises:
            RuntimeError: The process was never started.
        """
        return self._started().pid

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs or before it started."""
        return None if self._process is None else self._process.poll()

    @property
    def settled(self) -> bool:
        """Whether the process has become ready or has closed its stdout."""
        return self._settled.is_set()

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process and returns at once.

        Raises:
            RuntimeError: It is running already.
        """
        if self.running:
            raise RuntimeError(f"{self.module} is running already (pid {self.pid})")
        self._address = self._metrics_url = None
        self._settled = threading.Event()
        self._started_at_s = time.monotonic()
        self._tail.clear()
        process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.run_child", self.module, *self.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **self._env},
            # Ctrl-C reaches this process only, which then stops its services in order.
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._process = process
        self._readers = [
            threading.Thread(target=self._read_stdout, args=(process, self._settled), daemon=True),
            threading.Thread(target=self._read_stderr, args=(process,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def wait_until_ready(self, timeout_s: float) -> str:
        """Waits for the ready line and returns the address.

        Raises:
            ServiceStartError: The process ended or did not become ready in time. A process that
                did not become ready goes on running.
        """
        settled = self._settled.wait(timeout_s)
        if self._address is not None:
            return self._address
        if not settled:
            elapsed_s = time.monotonic() - self._started_at_s
            raise ServiceStartError(
                f"{self.module} was not ready {elapsed_s:.1f} s after its start"
                f"{self._quoted_tail()}"
            )
        try:
            status = f"exited with status {self.wait(DRAIN_S)}"
        except TimeoutError:
            status = "closed its standard output"
        raise ServiceStartError(f"{self.module} {status} before it was ready{self._quoted_tail()}")

    def terminate(self) -> None:
        """Asks the process to drain and end (SIGTERM). Does nothing if it has ended."""
        self._started().terminate()

    def kill(self) -> None:
        """Ends the process at once (SIGKILL). Does nothing if it has ended."""
        self._started().kill()

    def wait(self, timeout_s: float | None = None) -> int:
        """Waits for the end of the process and returns its exit status.

        Raises:
            TimeoutError: It still runs after `timeout_s`.
        """
        process = self._started()
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.module} still runs after {timeout_s} s") from None
        # What the process wrote last is worth having in errors.
        for reader in self._readers:
            reader.join(DRAIN_S)
        if process.stdin is not None:
            process.stdin.close()
        return status

    def stop(self, grace_s: float = 10.0) -> int | None:
        """Ends the process: SIGTERM, and SIGKILL if it still runs after `grace_s`.

        Returns:
            The exit status, or None if the process was never started.
        """
        if self._process is None:
            return None
        self.terminate()
        try:
            return self.wait(grace_s)
        except TimeoutError:
            logger.warning("%s did not end within %g s and is killed", self.module, grace_s)
            self.kill()
            return self.wait()

    def restart(self, timeout_s: float = 600.0) -> str:
        """Starts the ended process again with the same arguments and waits until it is ready.

        Returns:
            The address, which differs from the earlier one if the arguments ask for a free port.

        Raises:
            RuntimeError: It is still running.
            ServiceStartError: It did not become ready.
        """
        self.start()
        return self.wait_until_ready(timeout_s)

    def __enter__(self) -> "ServiceProcess":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError(f"{self.module} was never started; call start() first")
        return self._process

    def _quoted_tail(self) -> str:
        lines = [line for line in self._tail if line.strip()]
        return ": " + "\n  ".join(lines) if lines else " and wrote nothing to stderr"

    def _read_stdout(self, process: subprocess.Popen[str], settled: threading.Event) -> None:
        for line in self._lines(process.stdout):
            if settled.is_set():
                continue
            if line.startswith(METRICS_PREFIX):
                self._metrics_url = line.removeprefix(METRICS_PREFIX)
            elif line.startswith(READY_PREFIX):
                self._address = line.removeprefix(READY_PREFIX)
                settled.set()
                self._on_settled()
        if not settled.is_set():
            settled.set()
            self._on_settled()

    def _read_stderr(self, process: subprocess.Popen[str]) -> None:
        with contextlib.ExitStack() as stack:
            log: IO[str] = sys.stderr
            if self._log_path is not None:
                log = stack.enter_context(self._log_path.open("a", encoding="utf-8"))
            for line in self._lines(process.stderr):
                self._tail.append(line)
                log.write(f"{line}\n")
                log.flush()

    @staticmethod
    def _lines(stream: IO[str] | None) -> Iterator[str]:
        if stream is None:
            return
        with stream:
            for line in stream:
                yield line.rstrip("\n")
