"""Starts the gateway smg, which serves OpenAI's HTTP API in front of one or more schedulers."""

import atexit
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_HOST = "127.0.0.1"
_POLL_S = 0.1
_STOP_GRACE_S = 10.0
# Loopback is never reached through a proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

#: Beside addresses and ports: what docs/clients.md recommends.
ARGUMENTS = (
    *("--backend", "vllm", "--policy", "cache_aware"),
    # Our models' own text, whatever a parser would make of it.
    *("--reasoning-parser", "passthrough"),
    # Our admission control decides what is too much; the gateway's veto would cost affinity.
    "--disable-worker-overload-protection",
    *("--health-check-interval-secs", "2", "--health-failure-threshold", "2"),
    *("--health-success-threshold", "1", "--worker-startup-check-interval", "2"),
    *("--load-monitor-interval", "2", "--shutdown-grace-period-secs", "1"),
)


class GatewayError(RuntimeError):
    """smg is not installed, ended, or did not find its workers in time."""


class SmgGateway:
    """A child process. Use it as a context manager; it ends with this process in any case."""

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        arguments: Sequence[str] = (),
        log_path: Path | None = None,
        startup_timeout_s: float = 60.0,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            addresses: HOST:PORT of each scheduler.
            arguments: Further options of `smg launch`; they win over ours.
            log_path: File for its output; default: this process's stderr.
            startup_timeout_s: Limit for all schedulers to be found healthy.
        """
        self._addresses = tuple(addresses)
        self._arguments = tuple(arguments)
        self._log_path = log_path
        self._startup_timeout_s = startup_timeout_s
        self._port, self._metrics_port = _free_ports(2)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        """What OpenAI's clients call `base_url`."""
        return f"http://{_HOST}:{self._port}/v1"

    @property
    def num_healthy_workers(self) -> int:
        """Schedulers that take requests; 0 while the gateway itself does not answer."""
        return int(self._get("readiness").get("healthy_workers", 0))

    def start(self) -> "SmgGateway":
        """Starts it and waits until every scheduler is healthy. Raises GatewayError."""
        if find_spec("smg") is None:
            raise GatewayError("smg is not installed; pip install smg")
        log = None if self._log_path is None else self._log_path.open("ab")
        self._process = subprocess.Popen(
            # Under run_child it ends when this process does, however that happens.
            [sys.executable, "-m", "nanovllm.run_child", "smg", *self._command_line()],
            stdin=subprocess.PIPE,
            stdout=log or sys.stderr.fileno(),
            stderr=log or sys.stderr.fileno(),
            # It asks a model hub for tokenizers before it asks the scheduler; ours has them.
            env={"HF_ENDPOINT": "http://127.0.0.1:9", **os.environ},
        )
        if log is not None:
            log.close()
        atexit.register(self.close)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Stops it. Does nothing the second time."""
        atexit.unregister(self.close)
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def __enter__(self) -> "SmgGateway":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _command_line(self) -> list[str]:
        return [
            *("launch", "--host", _HOST, "--port", str(self._port)),
            *("--prometheus-host", _HOST, "--prometheus-port", str(self._metrics_port)),
            *("--worker-urls", *(f"grpc://{address}" for address in self._addresses)),
            *ARGUMENTS,
            *self._arguments,
        ]

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + self._startup_timeout_s
        while not (self._has_all_workers() and self._has_a_model()):
            if self._process is None or self._process.poll() is not None:
                raise GatewayError("smg ended before it was ready; its log says why")
            if time.monotonic() > deadline_s:
                raise GatewayError(
                    f"smg did not find {len(self._addresses)} healthy schedulers within "
                    f"{self._startup_timeout_s:g} s; its log says why"
                )
            time.sleep(_POLL_S)

    def _has_all_workers(self) -> bool:
        return self.num_healthy_workers == len(self._addresses)

    def _has_a_model(self) -> bool:
        return bool(self._get("v1/models").get("data"))

    def _get(self, path: str) -> dict[str, Any]:
        """The JSON at a path; empty if there is none."""
        try:
            with _OPENER.open(f"http://{_HOST}:{self._port}/{path}", timeout=5) as response:
                answer: dict[str, Any] = json.load(response)
                return answer
        except (OSError, ValueError):
            return {}


def _free_ports(count: int) -> list[int]:
    """Loopback ports that are free now; the kernel hands them out in random order."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind((_HOST, 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
