"""Both services on this machine, as child processes of this one."""

import atexit
import contextlib
import queue
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from nanovllm.model_store import resolve_model
from nanovllm.service_process import ServiceProcess, ServiceStartError

__all__ = ["LocalServices", "ServiceProcess", "ServiceStartError"]

EXECUTOR_MODULE = "executor_service"
SCHEDULER_MODULE = "scheduler_service"
#: Longest path that a unix socket can have on Linux and macOS, in bytes.
MAX_SOCKET_PATH_BYTES = 103


class LocalServices:
    """Starts an executor and a scheduler for one model, and stops them.

    Use it as a context manager, or call `start` and `close`. The services end with this process in
    any case.

        with LocalServices("smollm2-135m-instruct") as services:
            client = Client(services.address)
    """

    def __init__(
        self,
        model: str,
        *,
        executor_args: Sequence[str] = (),
        scheduler_args: Sequence[str] = (),
        listen: Literal["unix", "tcp"] = "unix",
        metrics: bool = False,
        env: Mapping[str, str] | None = None,
        log_dir: Path | None = None,
        startup_timeout_s: float = 600.0,
        stop_grace_s: float = 35.0,
        executor_module: str = EXECUTOR_MODULE,
        scheduler_module: str = SCHEDULER_MODULE,
    ) -> None:
        """Prepares the services; nothing runs before `start`.

        Args:
            model: A directory, an embedded model's name or a hub id.
            executor_args: Further command line arguments of the executor.
            scheduler_args: Further command line arguments of the scheduler.
            listen: "unix" for sockets in a private folder, "tcp" for free loopback ports.
            metrics: Whether both serve metrics on free loopback ports.
            env: Variables added to the services' environment.
            log_dir: Folder for executor.log and scheduler.log; default: this process's stderr.
            startup_timeout_s: Limit for both services to become ready.
            stop_grace_s: Limit for each service to drain before it is killed; the default is
                more than the scheduler's own limit (--drain-timeout-s, 30 s).
            executor_module: Module to run as the executor.
            scheduler_module: Module to run as the scheduler.
        """
        self._model = model
        self._executor_args = tuple(executor_args)
        self._scheduler_args = tuple(scheduler_args)
        self._listen = listen
        self._metrics = metrics
        self._env = env
        self._log_dir = log_dir
        self._startup_timeout_s = startup_timeout_s
        self._stop_grace_s = stop_grace_s
        self._executor_module = executor_module
        self._scheduler_module = scheduler_module
        self._folder: Path | None = None
        self._executor: ServiceProcess | None = None
        self._scheduler: ServiceProcess | None = None

    @property
    def address(self) -> str:
        """The scheduler's address, which clients connect to.

        Raises:
            RuntimeError: The services were not started.
        """
        return self.scheduler.address

    @property
    def executor_address(self) -> str:
        """The executor's address.

        Raises:
            RuntimeError: The services were not started.
        """
        return self.executor.address

    @property
    def executor(self) -> ServiceProcess:
        """The executor's process.

        Raises:
            RuntimeError: The services were not started.
        """
        return self._present(self._executor)

    @property
    def scheduler(self) -> ServiceProcess:
        """The scheduler's process.

        Raises:
            RuntimeError: The services were not started.
        """
        return self._present(self._scheduler)

    def start(self) -> "LocalServices":
        """Starts both services at the same time and waits until both are ready.

        Raises:
            ModelNotFoundError: There is no such model.
            ServiceStartError: A service ended or was not ready in time; both are stopped.
            RuntimeError: They were started already.
        """
        if self._scheduler is not None:
            raise RuntimeError("the services were started already")
        # Here rather than twice in the children, so that a download shows its progress.
        resolve_model(self._model)
        deadline = time.monotonic() + self._startup_timeout_s
        atexit.register(self.close)
        try:
            self._start_and_wait(deadline)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stops both services, the scheduler first. Does nothing the second time."""
        atexit.unregister(self.close)
        # The scheduler needs its executor to drain.
        for service in (self._scheduler, self._executor):
            if service is not None:
                service.stop(self._stop_grace_s)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> "LocalServices":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_and_wait(self, deadline: float) -> None:
        executor_address, scheduler_address = self._choose_addresses()
        # Without metrics, -1: the default ports would clash with services that run already.
        metrics_arg = f"--metrics-port={0 if self._metrics else -1}"
        settled: queue.SimpleQueue[None] = queue.SimpleQueue()

        def service(module: str, log_name: str, *arguments: str) -> ServiceProcess:
            return ServiceProcess(
                module,
                ["--model", self._model, *arguments, metrics_arg],
                env=self._env,
                log_path=None if self._log_dir is None else self._log_dir / log_name,
                on_settled=lambda: settled.put(None),
            )

        if self._log_dir is not None:
            self._log_dir.mkdir(parents=True, exist_ok=True)
        executor = self._executor = service(
            self._executor_module,
            "executor.log",
            *("--listen", executor_address, *self._executor_args),
        )
        scheduler = self._scheduler = service(
            self._scheduler_module,
            "scheduler.log",
            *("--executor", executor_address, "--listen", scheduler_address),
            *self._scheduler_args,
        )
        both = (executor, scheduler)
        for process in both:
            process.start()
        for _ in both:
            with contextlib.suppress(queue.Empty):
                settled.get(timeout=max(0.0, deadline - time.monotonic()))
            # A service that failed ends the wait for the other.
            for process in both:
                if process.settled:
                    process.wait_until_ready(0)
        for process in both:
            process.wait_until_ready(0)

    def _choose_addresses(self) -> tuple[str, str]:
        """Returns the executor's and the scheduler's address, known before either is ready."""
        if self._listen == "tcp":
            executor_port, scheduler_port = _free_ports(2)
            return f"127.0.0.1:{executor_port}", f"127.0.0.1:{scheduler_port}"
        self._folder = _private_folder()
        return f"unix:{self._folder}/executor.sock", f"unix:{self._folder}/scheduler.sock"

    @staticmethod
    def _present(service: ServiceProcess | None) -> ServiceProcess:
        if service is None:
            raise RuntimeError("the services are not started; call start() or use a with block")
        return service


def _free_ports(count: int) -> list[int]:
    """Returns loopback ports that are free now.

    The scheduler has to know the executor's port while the executor is still loading, so neither
    can pick its own. The kernel hands out ephemeral ports in random order, which makes it unlikely
    that another process gets one of these first; if it does, the start fails with a clear error.
    """
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _private_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="nanovllm-"))
    if len(bytes(folder / "scheduler.sock")) <= MAX_SOCKET_PATH_BYTES:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="nanovllm-", dir="/tmp"))
