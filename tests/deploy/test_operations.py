"""docs/operations.md: what it names exists, and its arithmetic is right."""

import re
from pathlib import Path

import pytest

from deploy.grafana.generate import DASHBOARDS, FOLDER
from deploy.grafana.queries import load_dashboard
from executor_service.settings import ExecutorSettings
from scheduler_service.settings import SchedulerSettings

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
BYTES_PER_NUMBER = {"bfloat16": 2, "float32": 4}


def section(heading: str) -> str:
    """The text below a heading of the second level."""
    return re.split(r"^## ", DOCUMENT.split(f"\n## {heading}\n", 1)[1], flags=re.MULTILINE)[0]


def kv_table() -> list[list[str]]:
    """Cells of the table of KV memory."""
    rows = [line for line in section("KV memory").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.parametrize(
    "heading",
    ["Start, stop, upgrade", "Several executors", "Alerts", "KV memory", "Tuning"],
)
def test_named_options_are_settings_of_a_service(heading: str) -> None:
    settings = (*ExecutorSettings.model_fields, *SchedulerSettings.model_fields)
    named = re.findall(r"`--([a-z-]+)`", section(heading))
    assert named
    assert [name for name in named if name.replace("-", "_") not in settings] == []


def test_named_metrics_are_documented() -> None:
    documented = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(nanovllm_\w+)`", DOCUMENT))
    assert named
    assert [name for name in named if f"`{name}`" not in documented] == []


def test_panels_named_in_the_runbook_exist() -> None:
    titles = [
        panel.title
        for name in DASHBOARDS
        for panel in load_dashboard(FOLDER / f"{name}.json").panels
    ]
    named = re.findall(r"(?<![*\w])\*([A-Z][^*]+)\*(?!\*)", section("Alerts"))
    assert len(named) > 10
    quoted_from_logs = {
        "Connection refused",
        "Another model",
        "Another scheduler has taken it over",
    }
    unknown = [
        name
        for name in set(named) - quoted_from_logs
        if not any(title.startswith(" ".join(name.split())) for title in titles)
    ]
    assert unknown == []


@pytest.mark.parametrize("row", kv_table(), ids=lambda row: f"{row[0]}-{row[4]}")
def test_kv_memory_of_a_model_is_what_the_formula_gives(row: list[str]) -> None:
    layers, kv_heads, head_size = (int(cell) for cell in row[1:4])
    token_bytes = 2 * layers * kv_heads * head_size * BYTES_PER_NUMBER[row[4]]
    assert row[5] == f"{token_bytes / 1024:g} KiB"
    assert row[6] == f"{2**30 // token_bytes:,} tokens"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_picture_of_a_dashboard_is_shown_and_small(name: str) -> None:
    assert f"(images/{name}.png)" in DOCUMENT
    assert (ROOT / f"docs/images/{name}.png").stat().st_size < 150_000
