"""One function for each kind of panel, so that equal things look equal on both dashboards."""

from dataclasses import dataclass
from typing import TypeAlias

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, text, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphDrawStyle,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    LineInterpolation,
    ScaleDistribution,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

from deploy.grafana import promql

#: The data source that the dashboard's variable has chosen.
DATA_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

Panel: TypeAlias = stat.Panel | timeseries.Panel | heatmap.Panel | text.Panel

_GREEN, _ORANGE, _RED = "green", "orange", "red"
_GRAPH_HEIGHT = 8
_STAT_HEIGHT = 4
_THIRD = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """Where a value gets bad, in the panel's unit; `is_floor`: below the limits, not above."""

    warning: float | None
    critical: float
    is_floor: bool = False

    def steps(self) -> list[Threshold]:
        """The same as colours, from the lowest value up."""
        if self.is_floor:
            colours = [(None, _RED), (self.critical, _ORANGE), (self.warning, _GREEN)]
            if self.warning is None:
                colours = [(None, _RED), (self.critical, _GREEN)]
        else:
            colours = [(None, _GREEN), (self.warning, _ORANGE), (self.critical, _RED)]
            if self.warning is None:
                colours = [(None, _GREEN), (self.critical, _RED)]
        return [Threshold(value=start, color=colour) for start, colour in colours]


@dataclass(frozen=True, slots=True)
class Line:
    """A query and what its series are called; labels in double braces are filled in."""

    legend: str
    expr: str


def value(
    title: str,
    description: str,
    expr: str,
    unit: str,
    limits: Limits | None = None,
    *,
    width: int = 3,
) -> stat.Panel:
    """One number, coloured where it has limits, over its recent course."""
    panel = (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATA_SOURCE)
        .span(width)
        .height(_STAT_HEIGHT)
        .unit(unit)
        .graph_mode(BigValueGraphMode.AREA)
        .color_mode(BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_query("A", Line("", expr)))
    )
    return panel.thresholds(_thresholds(limits.steps() if limits else [Threshold(color="text")]))


def graph(
    title: str,
    description: str,
    lines: list[Line],
    unit: str,
    *,
    limit: float | None = None,
    maximum: float | None = None,
    stacked: bool = False,
    stepped: bool = False,
    width: int = _THIRD,
) -> timeseries.Panel:
    """Lines over time from zero up, with a dashed line at `limit` where a value gets bad."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATA_SOURCE)
        .span(width)
        .height(_GRAPH_HEIGHT)
        .unit(unit)
        .min(0)
        .draw_style(GraphDrawStyle.LINE)
        .line_width(1)
        .fill_opacity(60 if stacked else 8)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
        .tooltip(
            common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    if stepped:
        panel.line_interpolation(LineInterpolation.STEP_AFTER)
    if maximum is not None:
        panel.max(maximum)
    if limit is not None:
        panel.thresholds(
            _thresholds([Threshold(color="transparent"), Threshold(value=limit, color=_RED)])
        ).thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    for index, line in enumerate(lines):
        panel.with_target(_query(chr(ord("A") + index), line))
    return panel


def percentiles(
    title: str,
    description: str,
    histogram: str,
    unit: str,
    *,
    limit: float | None = None,
    width: int = _THIRD,
) -> timeseries.Panel:
    """Median, 95th and 99th percentile of a histogram over time."""
    lines = [
        Line(f"p{percent}", promql.quantile(percent / 100, histogram)) for percent in (50, 95, 99)
    ]
    return graph(title, description, lines, unit, limit=limit, width=width)


def density(
    title: str, description: str, histogram: str, unit: str, *, width: int = _THIRD
) -> heatmap.Panel:
    """How many observations fell into which bucket, over time."""
    query = _query("A", Line("{{le}}", promql.bucket_growth(histogram)))
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(DATA_SOURCE)
        .span(width)
        .height(_GRAPH_HEIGHT)
        .calculate(False)
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Oranges")
            .scale(HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
            .fill("dark-orange")
        )
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .cell_gap(1)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .show_value(VisibilityMode.NEVER)
        .show_tooltip()
        .hide_y_histogram()
        .scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LINEAR))
        .with_target(query.format(PromQueryFormat.HEATMAP))
    )


def note(markdown: str, *, height: int = 2) -> text.Panel:
    """Text over the whole width that says how to read what follows."""
    return (
        text.Panel()
        .title("")
        .description("How to read the row below.")
        .transparent(True)
        .span(24)
        .height(height)
        .mode(TextMode.MARKDOWN)
        .content(markdown)
    )


def _query(ref_id: str, line: Line) -> prometheus.Dataquery:
    return (
        prometheus.Dataquery()
        .ref_id(ref_id)
        .datasource(DATA_SOURCE)
        .expr(line.expr)
        .legend_format(line.legend)
        .range()
    )


def _thresholds(steps: list[Threshold]) -> dashboards.ThresholdsConfig:
    return dashboards.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
