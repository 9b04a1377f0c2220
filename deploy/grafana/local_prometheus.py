"""A real Prometheus on this machine with our configuration, watching services on other ports."""

import json
import queue
import re
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from deploy.grafana.prometheus_api import PrometheusApi

CONFIGURATION = Path(__file__).parents[1] / "prometheus/prometheus.yml"
_LISTENING = re.compile(r'msg="Listening on" address=(\S+)')
_READY = "Server is ready to receive web requests"
_STOP_S = 10.0
#: Log lines that an error quotes.
_TAIL_LINES = 8


class LocalPrometheusError(RuntimeError):
    """Prometheus is not installed or does not start."""


class LocalPrometheus:
    """Runs while the `with` block does.

    It reads deploy/prometheus/prometheus.yml with all rules. Only the addresses of the targets and
    the intervals differ; the targets keep the instance labels that they would have.
    """

    def __init__(
        self,
        folder: Path,
        metrics_urls: Mapping[str, str],
        *,
        interval_s: float = 1.0,
        startup_timeout_s: float = 30.0,
    ) -> None:
        """Prepares it; nothing runs before the `with` block.

        Args:
            folder: For configuration and data; created if absent.
            metrics_urls: The URL of the metrics page for each job name.
            interval_s: Between scrapes, and between evaluations of the rules.
            startup_timeout_s: Limit for it to answer.
        """
        self._folder = folder
        self._metrics_urls = dict(metrics_urls)
        self._interval_s = interval_s
        self._startup_timeout_s = startup_timeout_s
        self._instances: dict[str, str] = {}
        self._process: subprocess.Popen[str] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._address: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __enter__(self) -> PrometheusApi:
        """Starts it. Raises LocalPrometheusError."""
        program = shutil.which("prometheus")
        if program is None:
            raise LocalPrometheusError(
                "there is no prometheus on the PATH; on Debian: apt-get install prometheus"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        configuration = self._folder / "prometheus.yml"
        configuration.write_text(yaml.safe_dump(self._configuration()))
        for job in self._metrics_urls:
            self._write_target(job)
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={configuration}",
                f"--storage.tsdb.path={self._folder / 'data'}",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read_log, args=(self._process,), daemon=True).start()
        try:
            address = self._address.get(timeout=self._startup_timeout_s)
        except queue.Empty:
            address = ""
        if not address:
            self._stop()
            raise LocalPrometheusError("Prometheus did not start:\n" + "\n".join(self._tail))
        return PrometheusApi(f"http://{address}")

    def __exit__(self, *_: object) -> None:
        self._stop()

    def move_target(self, job: str, metrics_url: str) -> None:
        """Says where a service that was restarted serves its metrics now."""
        self._metrics_urls[job] = metrics_url
        self._write_target(job)

    def _configuration(self) -> dict[str, Any]:
        document: dict[str, Any] = yaml.safe_load(CONFIGURATION.read_text(encoding="utf-8"))
        interval = f"{int(self._interval_s * 1000)}ms"
        document["global"] = dict.fromkeys(
            ("scrape_interval", "scrape_timeout", "evaluation_interval"), interval
        )
        document["rule_files"] = [
            str(CONFIGURATION.parent / pattern) for pattern in document["rule_files"]
        ]
        for scrape in document["scrape_configs"]:
            job = scrape["job_name"]
            ((self._instances[job],),) = (item["targets"] for item in scrape.pop("static_configs"))
            scrape["file_sd_configs"] = [
                {"files": [str(self._target_file(job))], "refresh_interval": interval}
            ]
        return document

    def _target_file(self, job: str) -> Path:
        return self._folder / f"{job}.json"

    def _write_target(self, job: str) -> None:
        target = {
            "targets": [urlsplit(self._metrics_urls[job]).netloc],
            "labels": {"instance": self._instances[job]},
        }
        # Replaced at once, because Prometheus may read it at any time.
        written = self._target_file(job).with_suffix(".new")
        written.write_text(json.dumps([target]))
        written.replace(self._target_file(job))

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        if process.stderr is None:
            return
        address = ""
        with process.stderr:
            for line in process.stderr:
                self._tail.append(line.rstrip())
                if found := _LISTENING.search(line):
                    address = found[1]
                # It listens before it can answer.
                if _READY in line:
                    self._address.put(address)
        self._address.put("")

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
