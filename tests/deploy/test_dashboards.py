"""The dashboards' JSON: up to date, complete, and laid out without gaps."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.generate import DASHBOARDS, FOLDER, to_json
from deploy.grafana.queries import (
    DashboardSpec,
    PanelSpec,
    UnknownVariableError,
    legend,
    load_dashboard,
    substitute,
)

PROVISIONING = FOLDER.parent / "provisioning"
COLUMNS = 24
SPECS = {name: load_dashboard(FOLDER / f"{name}.json") for name in DASHBOARDS}
DRAWN = [
    pytest.param(panel, id=f"{name}-{panel.title}")
    for name, spec in SPECS.items()
    for panel in spec.panels
    if panel.kind not in ("row", "text")
]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_json_is_what_the_python_module_generates(name: str) -> None:
    path = FOLDER / f"{name}.json"
    assert path.read_text(encoding="utf-8") == to_json(DASHBOARDS[name]()), (
        f"{path.name} is stale; run `make dashboards`"
    )


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_key_is_one_that_grafana_knows(name: str) -> None:
    register_default_plugins()
    document = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    # What the schema does not know is lost on the way.
    read = Dashboard.from_json(document)
    assert json.loads(json.dumps(read, cls=JSONEncoder)) == document


def test_no_dashboard_file_is_without_its_source() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(DASHBOARDS)


@pytest.mark.parametrize("panel", DRAWN)
def test_panel_says_what_it_means_and_when_it_is_bad(panel: PanelSpec) -> None:
    assert len(panel.description) > 60
    # Each says so in these words.
    assert re.search(r"\b[Bb]ad\b", panel.description)


@pytest.mark.parametrize("panel", DRAWN)
def test_panel_has_a_unit_and_queries_that_heed_the_variables(panel: PanelSpec) -> None:
    assert panel.unit
    assert panel.queries
    for query in panel.queries:
        assert '{model_name=~"$model_name"' in query.expr
        assert "5m" not in query.expr


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_panels_fill_every_line_and_never_overlap(spec: DashboardSpec) -> None:
    cells = Counter(
        (column, line)
        for panel in spec.panels
        for column in range(panel.position.x, panel.position.x + panel.position.width)
        for line in range(panel.position.y, panel.position.y + panel.position.height)
    )
    last_line = max(line for _, line in cells)
    assert set(cells) == {(x, y) for x in range(COLUMNS) for y in range(last_line + 1)}
    assert set(cells.values()) == {1}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_first_row_answers_who_waits_why_and_what_the_gpu_does(spec: DashboardSpec) -> None:
    row, text, *rest = spec.panels
    assert row.title == "Does anyone wait, why, and what does the GPU do?"
    assert text.kind == "text"
    stats = rest[:8]
    assert {panel.kind for panel in stats} == {"stat"}
    assert {"Waiting", "GPU busy", "GPU idle with work"} <= {panel.title for panel in stats}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_two_panels_of_a_kind_have_the_same_title(spec: DashboardSpec) -> None:
    titles = Counter((panel.kind, panel.title) for panel in spec.panels)
    assert [title for title, count in titles.items() if count > 1] == []


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_link_to_each_other(name: str) -> None:
    document = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    (link,) = document["links"]
    assert link["includeVars"]
    assert link["keepTime"]
    assert set(link["tags"]) <= set(document["tags"])


@pytest.mark.parametrize("path", sorted(PROVISIONING.rglob("*.yml")), ids=lambda path: path.name)
def test_provisioning_is_version_1(path: Path) -> None:
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["apiVersion"] == 1


def test_data_source_knows_the_scrape_interval_of_the_shipped_configuration() -> None:
    path = PROVISIONING / "datasources/prometheus.yml"
    (source,) = yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    configuration = FOLDER.parents[1] / "prometheus/prometheus.yml"
    scraped = yaml.safe_load(configuration.read_text(encoding="utf-8"))
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]


def test_both_spellings_of_a_variable_are_replaced() -> None:
    assert substitute("rate(a[$w]) + ${b}", {"w": "20s", "b": "1"}) == "rate(a[20s]) + 1"


def test_variable_without_a_value_is_an_error() -> None:
    with pytest.raises(UnknownVariableError, match=r"\$window"):
        substitute("rate(a[$window])", {})


def test_legend_takes_labels_and_leaves_absent_ones_empty() -> None:
    assert legend("{{kind}} of {{ job }}{{none}}", {"kind": "decode", "job": "e"}) == "decode of e"
