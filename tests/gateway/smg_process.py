"""smg with a command line of the test's own; `examples.smg` has one that is fixed."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_HOST = "127.0.0.1"
# Loopback is never reached through a proxy.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_STOP_GRACE_S = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Status 0: nobody listens."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class SmgProcess:
    """A running gateway."""

    port: int
    probe_port: int
    metrics_port: int
    log_path: Path

    @property
    def base_url(self) -> str:
        """What OpenAI's clients call `base_url`."""
        return f"http://{_HOST}:{self.port}/v1"

    @property
    def num_healthy_workers(self) -> int:
        """Replicas that it sends requests to."""
        answer = self.get("/readiness", self.probe_port)
        return int(json.loads(answer.text).get("healthy_workers", 0)) if answer.status else 0

    def get(self, path: str, port: int | None = None, key: str | None = None) -> Answer:
        """The answer at a path of a port, by default the one of the API."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        request = urllib.request.Request(
            f"http://{_HOST}:{port or self.port}{path}", headers=headers
        )
        try:
            with _OPENER.open(request, timeout=5) as response:
                return Answer(response.status, response.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())
        except OSError as error:
            return Answer(0, str(error))


@contextmanager
def running_smg(
    arguments: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None
) -> Iterator[SmgProcess]:
    """Starts `smg launch` with arguments, on free loopback ports whatever they say; stops it.

    It need not be ready when this returns.
    """
    port, probe_port, metrics_port = free_ports(3)
    command = [
        # Under run_child it ends when this process does, however that happens.
        *(sys.executable, "-m", "nanovllm.run_child", "smg", "launch", *arguments),
        *("--host", _HOST, "--port", str(port), "--health-check-port", str(probe_port)),
        *("--prometheus-host", _HOST, "--prometheus-port", str(metrics_port)),
        *("--shutdown-grace-period-secs", "1"),
    ]
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            # No model hub, and no proxy between the processes of a test.
            env={
                **os.environ,
                "HF_ENDPOINT": "http://127.0.0.1:9",
                "NO_PROXY": "*",
                **(environment or {}),
            },
        )
    try:
        yield SmgProcess(port, probe_port, metrics_port, log_path)
    finally:
        process.terminate()
        try:
            process.wait(_STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()


def free_ports(count: int, hosts: Sequence[str] = (_HOST,)) -> list[int]:
    """Ports that are free now on every one of the hosts."""
    sockets: list[socket.socket] = []
    found: list[int] = []
    try:
        while len(found) < count:
            port = 0
            for host in hosts:
                sockets.append(socket.socket())
                sockets[-1].bind((host, port))
                port = sockets[-1].getsockname()[1]
            found.append(port)
        return found
    finally:
        for item in sockets:
            item.close()
