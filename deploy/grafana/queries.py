"""Reads the dashboards' JSON back: panels, queries, and what Grafana puts in for variables."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")


class UnknownVariableError(ValueError):
    """A query uses a variable that nobody gave a value."""


@dataclass(frozen=True, slots=True)
class Query:
    """One target of a panel."""

    ref_id: str
    expr: str
    # Name of the series, with labels in double braces.
    legend: str


@dataclass(frozen=True, slots=True)
class GridPosition:
    """Place on the dashboard, in columns of 24 and in lines."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class PanelSpec:
    """What is needed to draw a panel without Grafana."""

    kind: str
    title: str
    description: str
    unit: str
    position: GridPosition
    queries: tuple[Query, ...]
    # From the value on the second of each pair the first is the colour; None: from the lowest on.
    thresholds: tuple[tuple[str, float | None], ...]
    is_stacked: bool
    maximum: float | None
    # Of text panels.
    markdown: str


@dataclass(frozen=True, slots=True)
class DashboardSpec:
    """A dashboard as far as its queries are concerned."""

    title: str
    panels: tuple[PanelSpec, ...]
    annotations: tuple[str, ...]
    # Queries of template variables by name.
    variables: Mapping[str, str]


def load_dashboard(path: Path) -> DashboardSpec:
    """Reads a dashboard's JSON file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return DashboardSpec(
        title=document["title"],
        panels=tuple(_panel(panel) for panel in document["panels"]),
        annotations=tuple(item["expr"] for item in document["annotations"]["list"]),
        variables={
            item["name"]: item["query"]
            for item in document["templating"]["list"]
            if item["type"] == "query"
        },
    )


def substitute(expr: str, values: Mapping[str, str]) -> str:
    """Puts values in for `$name` and `${name}`. Raises UnknownVariableError."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            raise UnknownVariableError(f"no value for ${name} in {expr}")
        return values[name]

    return _VARIABLE.sub(value, expr)


def legend(template: str, labels: Mapping[str, str]) -> str:
    """The name that Grafana gives a series."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), template)


def _panel(panel: dict[str, Any]) -> PanelSpec:
    defaults = panel.get("fieldConfig", {}).get("defaults", {})
    custom, options = defaults.get("custom", {}), panel.get("options", {})
    grid = panel["gridPos"]
    return PanelSpec(
        kind=panel["type"],
        title=panel["title"],
        description=panel.get("description", ""),
        unit=defaults.get("unit") or options.get("yAxis", {}).get("unit", ""),
        position=GridPosition(grid["x"], grid["y"], grid["w"], grid["h"]),
        queries=tuple(
            Query(target["refId"], target["expr"], target["legendFormat"])
            for target in panel.get("targets", [])
        ),
        thresholds=tuple(
            (step["color"], step["value"])
            for step in defaults.get("thresholds", {}).get("steps", [])
        ),
        is_stacked=custom.get("stacking", {}).get("mode") == "normal",
        maximum=defaults.get("max"),
        markdown=options.get("content", ""),
    )
