"""Draws the dashboards from a Prometheus, laid out as in Grafana, one PNG for each.

    python -m deploy.grafana.render --prometheus http://127.0.0.1:9090 --minutes 30

For documents and for machines without Grafana. Every picture says that it is no screenshot.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from PIL import Image

from deploy.grafana.drawing import NamedSeries, draw
from deploy.grafana.generate import DASHBOARDS, FOLDER
from deploy.grafana.prometheus_api import PrometheusApi
from deploy.grafana.queries import (
    DashboardSpec,
    PanelSpec,
    legend,
    load_dashboard,
    substitute,
)

_COLUMNS = 24
_WIDTH_INCHES = 16.0
_LINE_INCHES = 0.27
_HEAD_INCHES = 0.5
_DOTS_PER_INCH = 80
# Few lines and flat areas; a palette keeps the files small.
_PALETTE_COLOURS = 96
# Grafana asks for about as many points as the panel has pixels.
_POINTS = 240
_SCRAPES_IN_WINDOW = 4


@dataclass(frozen=True, slots=True)
class TimeRange:
    """What to draw: Unix times in seconds, and how often Prometheus scraped meanwhile."""

    start_s: float
    end_s: float
    scrape_interval_s: float

    @property
    def step_s(self) -> float:
        """Between two points."""
        return max(1.0, (self.end_s - self.start_s) / _POINTS)

    def variables(self) -> dict[str, str]:
        """Values for the dashboards' variables: all models, and Grafana's rate interval."""
        window_s = max(_SCRAPES_IN_WINDOW * self.scrape_interval_s, self.step_s)
        return {"model_name": ".+", "__rate_interval": f"{window_s * 1000:.0f}ms"}


def render(api: PrometheusApi, dashboard: DashboardSpec, over: TimeRange, path: Path) -> None:
    """Writes one dashboard's picture. Raises PrometheusError."""
    lines = max(panel.position.y + panel.position.height for panel in dashboard.panels)
    height = _HEAD_INCHES + lines * _LINE_INCHES
    figure = Figure(figsize=(_WIDTH_INCHES, height), dpi=_DOTS_PER_INCH)
    figure.text(0.012, 1 - 0.12 / height, dashboard.title, fontsize=13, weight="bold", va="top")
    figure.text(0.988, 1 - 0.16 / height, _caption(over), fontsize=7.5, ha="right", va="top")
    for panel in dashboard.panels:
        draw(
            figure.add_axes(_place(panel, height)),
            panel,
            _fetch(api, panel, over),
            (over.start_s, over.end_s),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(_PALETTE_COLOURS).save(path, optimize=True)


def render_all(api: PrometheusApi, over: TimeRange, folder: Path) -> list[Path]:
    """Writes NAME.png for every dashboard and returns the paths. Raises PrometheusError."""
    paths = []
    for name in DASHBOARDS:
        paths.append(folder / f"{name}.png")
        render(api, load_dashboard(FOLDER / f"{name}.json"), over, paths[-1])
    return paths


def _caption(over: TimeRange) -> str:
    minutes = (over.end_s - over.start_s) / 60
    day = datetime.fromtimestamp(over.end_s, UTC)
    return (
        "Plotted with matplotlib from the panels' own queries against Prometheus; not a Grafana "
        f"screenshot. {minutes:.0f} minutes up to {day:%Y-%m-%d %H:%M} UTC."
    )


def _fetch(api: PrometheusApi, panel: PanelSpec, over: TimeRange) -> list[NamedSeries]:
    return [
        NamedSeries(legend(query.legend, series.labels), series)
        for query in panel.queries
        for series in api.query_range(
            substitute(query.expr, over.variables()), over.start_s, over.end_s, over.step_s
        )
    ]


def _place(panel: PanelSpec, height: float) -> tuple[float, float, float, float]:
    """Left, bottom, width and height as shares of the figure."""
    grid = panel.position
    has_axes = panel.kind in ("timeseries", "heatmap")
    # Room for the labels of the axes and the title.
    left, right, top, bottom = (0.5, 0.12, 0.24, 0.24) if has_axes else (0.08, 0.08, 0.2, 0.06)
    if panel.kind in ("row", "text"):
        left, right, top, bottom = 0.2, 0.2, 0.0, 0.0
    column = _WIDTH_INCHES / _COLUMNS
    x0, x1 = grid.x * column + left, (grid.x + grid.width) * column - right
    y1 = height - _HEAD_INCHES - grid.y * _LINE_INCHES - top
    y0 = height - _HEAD_INCHES - (grid.y + grid.height) * _LINE_INCHES + bottom
    return x0 / _WIDTH_INCHES, y0 / height, (x1 - x0) / _WIDTH_INCHES, (y1 - y0) / height


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Draw the dashboards from a Prometheus.")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=30.0, help="how far to look back")
    parser.add_argument(
        "--scrape-interval-s", type=float, default=5.0, metavar="S", help="of that Prometheus"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/images"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    now_s = time.time()
    over = TimeRange(now_s - 60 * options.minutes, now_s, options.scrape_interval_s)
    for path in render_all(PrometheusApi(options.prometheus), over, options.output):
        print(path)


if __name__ == "__main__":
    main()
