"""Starting a Prometheus of our own, when that fails."""

import shutil
from pathlib import Path

import pytest

from deploy.grafana import local_prometheus
from deploy.grafana.local_prometheus import LocalPrometheus, LocalPrometheusError
from deploy.grafana.prometheus_api import PrometheusApi, PrometheusError

URLS = {
    "nanovllm-scheduler": "http://127.0.0.1:1/metrics",
    "nanovllm-executor": "http://127.0.0.1:2/metrics",
}


def test_missing_program_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalPrometheusError, match="apt-get install prometheus"):
        LocalPrometheus(tmp_path / "data", URLS).__enter__()


@pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="prometheus is not installed (Debian: apt-get install prometheus)",
)
def test_configuration_that_prometheus_refuses_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = local_prometheus.CONFIGURATION.read_text(encoding="utf-8")
    broken = tmp_path / "prometheus.yml"
    broken.write_text(shipped + "no_such_section: 1\n", encoding="utf-8")
    monkeypatch.setattr(local_prometheus, "CONFIGURATION", broken)
    with pytest.raises(LocalPrometheusError, match="no_such_section"):
        LocalPrometheus(tmp_path / "data", URLS).__enter__()


def test_server_that_is_not_there_is_named() -> None:
    with pytest.raises(PrometheusError, match=r"cannot reach http://127\.0\.0\.1:1"):
        PrometheusApi("http://127.0.0.1:1/").query("up")
