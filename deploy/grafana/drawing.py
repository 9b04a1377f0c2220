"""Draws panels with matplotlib from what their queries returned."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from deploy.grafana.number_format import format_number
from deploy.grafana.prometheus_api import Series
from deploy.grafana.queries import PanelSpec

_COLOURS = {"green": "#37872d", "orange": "#e07b00", "red": "#c4162a", "text": "#1f4e9c"}
_LINES = ("#1f78b4", "#ff7f00", "#33a02c", "#e31a1c", "#6a3d9a", "#b15928", "#8c8c8c")
_SMALL, _NORMAL, _LARGE = 6.0, 7.5, 15.0
_SECONDS_PER_DAY = 86_400.0
# Series above which those that are zero all the time are left out.
_MANY = 6


@dataclass(frozen=True, slots=True)
class NamedSeries:
    """A series with the name from its query's legend."""

    name: str
    series: Series


def draw(
    axes: Axes, panel: PanelSpec, data: Sequence[NamedSeries], time_range_s: tuple[float, float]
) -> None:
    """Draws one panel of any kind into its place; `time_range_s` in Unix time."""
    match panel.kind:
        case "row":
            _draw_row(axes, panel)
        case "text":
            _draw_text(axes, panel)
        case "stat":
            _draw_stat(axes, panel, data)
        case "heatmap":
            _frame(axes, panel, time_range_s)
            _draw_heatmap(axes, panel, data)
        case _:
            _frame(axes, panel, time_range_s)
            _draw_graph(axes, panel, data)


def _draw_row(axes: Axes, panel: PanelSpec) -> None:
    axes.set_axis_off()
    axes.axhline(0.1, color="#aaaaaa", linewidth=0.8)
    axes.text(0, 0.25, panel.title, fontsize=9, fontweight="bold", va="bottom")
    axes.set(xlim=(0, 1), ylim=(0, 1))


def _draw_text(axes: Axes, panel: PanelSpec) -> None:
    axes.set_axis_off()
    plain = panel.markdown.replace("**", "")
    axes.text(0, 0.9, textwrap.fill(plain, 260), fontsize=_NORMAL, va="top")


def _draw_stat(axes: Axes, panel: PanelSpec, data: Sequence[NamedSeries]) -> None:
    axes.set_title(panel.title, fontsize=_NORMAL, loc="left")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#dddddd")
    values = np.array(data[0].series.values if data else [math.nan])
    finite = values[np.isfinite(values)]
    last = float(finite[-1]) if finite.size else math.nan
    colour = _COLOURS[_threshold_colour(panel, last)]
    if finite.size:
        axes.fill_between(np.arange(values.size), values, color=colour, alpha=0.18, linewidth=0)
        # The lower half is the course, the upper one the number.
        axes.set_ylim(0, 2.2 * max(float(finite.max()), 1e-9))
        axes.set_xlim(0, max(values.size - 1, 1))
    axes.text(
        *(0.5, 0.68, format_number(last, panel.unit)),
        transform=axes.transAxes,
        ha="center",
        va="center",
        fontsize=_LARGE,
        color=colour,
    )


def _threshold_colour(panel: PanelSpec, value: float) -> str:
    reached = [colour for colour, start in panel.thresholds if start is None or value >= start]
    return reached[-1] if reached else "text"


def _draw_graph(axes: Axes, panel: PanelSpec, data: Sequence[NamedSeries]) -> None:
    shown = [item for item in data if item.series.has_data]
    if len(shown) > _MANY:
        # The names of reasons that never occurred would hide the one that did.
        shown = [item for item in shown if any(item.series.values)]
    colours = [_LINES[index % len(_LINES)] for index in range(len(shown))]
    names = [item.name for item in shown]
    if panel.is_stacked and shown:
        times = sorted({time_s for item in shown for time_s in item.series.times_s})
        rows = [_aligned(item.series, times) for item in shown]
        axes.stackplot(_days(times), rows, labels=names, colors=colours, alpha=0.75)
    else:
        for item, colour in zip(shown, colours, strict=True):
            times_s, values = item.series.times_s, item.series.values
            axes.plot(_days(times_s), values, color=colour, linewidth=0.9, label=item.name)
    for colour, start in panel.thresholds:
        if start is not None and colour == "red":
            axes.axhline(start, color=_COLOURS["red"], linewidth=0.7, linestyle="--")
    # Room for the legend above the lines.
    highest = 1.3 * axes.get_ylim()[1] if any(any(item.series.values) for item in shown) else 1.0
    axes.set_ylim(0, panel.maximum or highest)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: format_number(y, panel.unit)))
    if any(names):
        axes.legend(fontsize=_SMALL, loc="upper left", ncols=2, framealpha=0.6, borderpad=0.2)


def _draw_heatmap(axes: Axes, panel: PanelSpec, data: Sequence[NamedSeries]) -> None:
    buckets = sorted(data, key=lambda item: float(item.series.labels["le"]))
    times = sorted({time_s for item in buckets for time_s in item.series.times_s})
    if len(times) < 2:
        return
    cumulative = np.array([_aligned(item.series, times) for item in buckets])
    counts = np.diff(cumulative, axis=0, prepend=0.0).clip(min=0.0)
    used = np.flatnonzero(counts.sum(axis=1))
    if used.size == 0:
        return
    low, high = max(0, int(used[0]) - 1), min(len(buckets), int(used[-1]) + 2)
    shade = np.ma.masked_less_equal(np.sqrt(counts[low:high]), 0.0)
    axes.pcolormesh(
        _days(times), np.arange(low, high) + 0.5, shade, cmap="Oranges", shading="nearest"
    )
    bounds = range(low, high)
    axes.set_yticks(
        [bound + 1 for bound in bounds],
        [_bound(buckets[bound].series.labels["le"], panel.unit) for bound in bounds],
    )
    axes.set_ylim(low, high)


def _bound(upper: str, unit: str) -> str:
    return "over" if upper == "+Inf" else format_number(float(upper), unit)


def _frame(axes: Axes, panel: PanelSpec, time_range_s: tuple[float, float]) -> None:
    axes.set_title(panel.title, fontsize=_NORMAL, loc="left")
    axes.tick_params(labelsize=_SMALL, length=2, width=0.5)
    axes.grid(color="#e6e6e6", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_xlim(*_days(time_range_s))
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=9))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    for spine in axes.spines.values():
        spine.set_color("#cccccc")


def _aligned(series: Series, times_s: Sequence[float]) -> list[float]:
    """The values at `times_s`, zero where there is none."""
    known = dict(zip(series.times_s, series.values, strict=True))
    return [value if math.isfinite(value := known.get(t, 0.0)) else 0.0 for t in times_s]


def _days(times_s: Sequence[float]) -> list[float]:
    """matplotlib's dates."""
    return [time_s / _SECONDS_PER_DAY for time_s in times_s]
