"""Runs Docker Compose on the repository's docker-compose.yml."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TLS_FILE = "deploy/docker/compose.tls.yml"
TWO_EXECUTORS_FILE = "deploy/docker/compose.two-executors.yml"
PASSWORD = {"GRAFANA_ADMIN_PASSWORD": "secret"}
# What a developer's own .env and shell may set.
INTERPOLATED = (
    *(
        "SERVED_MODEL",
        "PUBLISH_ADDRESS",
        "SCHEDULER_PORT",
        "GATEWAY_PORT",
        "PROMETHEUS_PORT",
        "GRAFANA_PORT",
    ),
    *("PROMETHEUS_RETENTION", "GRAFANA_PUBLISH_ADDRESS", "EXECUTOR_GPU", "SECOND_EXECUTOR_GPU"),
    *(
        "EXECUTOR_MEMORY",
        "SCHEDULER_MEMORY",
        "FLASH_ATTN",
        "TORCH_INDEX",
        "SETTINGS_FILE",
        "TLS_DIR",
        "HF_TOKEN",
    ),
    *("COMPOSE_FILE", "COMPOSE_PROFILES", "GRAFANA_ADMIN_PASSWORD"),
)


def executable() -> list[str]:
    """The command of Docker Compose; skips the test where there is none."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if standalone := shutil.which("docker-compose", path=path):
        return [standalone]
    docker = shutil.which("docker")
    if (
        docker
        and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0
    ):
        return [docker, "compose"]
    pytest.skip("Docker Compose is not installed; it comes with the extra dev")


def command(
    arguments: Sequence[str],
    environment: Mapping[str, str] = PASSWORD,
    *,
    files: Sequence[str] = ("docker-compose.yml",),
) -> tuple[list[str], dict[str, str]]:
    """Returns the words and the environment of a call with these variables and no others."""
    inherited = {name: value for name, value in os.environ.items() if name not in INTERPOLATED}
    named = [word for file in files for word in ("--file", file)]
    words = [*executable(), "--project-directory", str(ROOT), "--env-file", os.devnull, *named]
    return [*words, *arguments], {**inherited, **environment}


def run(
    arguments: Sequence[str],
    environment: Mapping[str, str] = PASSWORD,
    *,
    files: Sequence[str] = ("docker-compose.yml",),
    timeout_s: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Runs Compose to its end, in the repository's root."""
    words, variables = command(arguments, environment, files=files)
    return subprocess.run(
        words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=timeout_s
    )


def configuration(
    profile: str,
    environment: Mapping[str, str] = PASSWORD,
    *,
    tls: bool = False,
    two_executors: bool = False,
) -> dict[str, Any]:
    """The whole file with a profile, variables filled in and anchors resolved."""
    files = [
        "docker-compose.yml",
        *([TLS_FILE] if tls else []),
        *([TWO_EXECUTORS_FILE] if two_executors else []),
    ]
    result = run(["--profile", profile, "config", "--format", "json"], environment, files=files)
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document
