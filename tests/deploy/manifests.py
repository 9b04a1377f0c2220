"""The Kubernetes manifests as kustomize renders them."""

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.compose import ROOT

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = ("cpu", "gpu", "tls", "gateway")


def tool(name: str) -> str:
    """Path of a program that comes with the extra dev; skips the test where it is missing."""
    path = shutil.which(name, path=str(Path(sys.executable).parent))
    if path is None:
        pytest.skip(f"{name} is not installed; it comes with the extra dev")
    return path


@cache
def rendered(overlay: str) -> str:
    """What `kubectl apply --kustomize` would send."""
    command = [tool("kubectl"), "kustomize", str(FOLDER / "overlays" / overlay)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def objects(overlay: str) -> dict[tuple[str, str], Any]:
    """Objects of an overlay by kind and name."""
    documents = yaml.safe_load_all(rendered(overlay))
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def pod(overlay: str) -> dict[str, Any]:
    """Specification of a replica's pod."""
    spec: dict[str, Any] = objects(overlay)["StatefulSet", "nanovllm"]["spec"]["template"]["spec"]
    return spec


def containers(overlay: str) -> dict[str, Any]:
    """The containers of a replica's pod by name."""
    spec = pod(overlay)
    return {c["name"]: c for c in [*spec["initContainers"], *spec["containers"]]}


def environment(overlay: str, container: str) -> dict[str, str]:
    """What a container of a replica gets, as far as the manifests say it."""
    found: dict[str, str] = {}
    for source in containers(overlay)[container]["envFrom"]:
        found |= objects(overlay)["ConfigMap", source["configMapRef"]["name"]]["data"]
    plain = containers(overlay)[container]["env"]
    return found | {entry["name"]: entry["value"] for entry in plain if "value" in entry}
