"""Prometheus's configuration and rules, checked by promtool and against the runbook."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from executor_service.settings import ExecutorSettings
from nanovllm.service_settings import ServiceSettings
from scheduler_service.settings import SchedulerSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/prometheus"
RULE_FILES = sorted(FOLDER.glob("rules/*.yml"))
TEST_FILES = sorted(FOLDER.glob("tests/*.yml"))
RUNBOOK = ROOT / "docs/operations.md"
LIMIT_S = 60.0

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: apt-get install prometheus)",
)


def promtool(*arguments: str | Path) -> None:
    """Runs promtool; the test fails with what it printed."""
    result = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert result.returncode == 0, result.stdout + result.stderr


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules of a kind: "record" or "alert"."""
    documents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RULE_FILES]
    return [
        rule
        for document in documents
        for group in document["groups"]
        for rule in group["rules"]
        if kind in rule
    ]


ALERTS = [pytest.param(rule, id=rule["alert"]) for rule in rules("alert")]


@needs_promtool
def test_configuration_is_valid() -> None:
    promtool("check", "config", FOLDER / "prometheus.yml")


@needs_promtool
@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.stem)
def test_rules_are_valid(path: Path) -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", path)


@needs_promtool
@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_rules_do_what_their_unit_tests_say(path: Path) -> None:
    promtool("test", "rules", path)


@pytest.mark.parametrize("kind", ["record", "alert"])
def test_every_rule_has_a_unit_test(kind: str) -> None:
    tested = "".join(path.read_text(encoding="utf-8") for path in TEST_FILES)
    # Recorded series that alerts use are tested with them.
    tested += "".join(alert["expr"] for alert in rules("alert"))
    names = [rule[kind] for rule in rules(kind)]
    assert len(names) == len(set(names))
    assert [name for name in names if name not in tested] == []


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_says_what_is_wrong_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in ("critical", "warning")
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    path, _, anchor = notes["runbook_url"].partition("#")
    assert ROOT / path == RUNBOOK
    assert anchor == alert["alert"].lower()
    assert f"### {alert['alert']}\n" in RUNBOOK.read_text(encoding="utf-8")


def test_runbook_has_no_section_for_an_alert_that_is_gone() -> None:
    sections = re.findall(r"^### (Nanovllm\w+)$", RUNBOOK.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(sections) == {rule["alert"] for rule in rules("alert")}


def test_targets_are_the_services_default_metrics_ports() -> None:
    document = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    targets = {
        scrape["job_name"]: [
            target for item in scrape["static_configs"] for target in item["targets"]
        ]
        for scrape in document["scrape_configs"]
    }
    assert targets == {
        "nanovllm-scheduler": [f"scheduler:{default_metrics_port(SchedulerSettings)}"],
        "nanovllm-executor": [f"executor:{default_metrics_port(ExecutorSettings)}"],
    }


def default_metrics_port(settings: type[ServiceSettings]) -> int:
    """Where a service serves its metrics if nothing else is asked for."""
    port: int = settings.model_fields["metrics_port"].default
    return port
