"""What both dashboards have in common: variables, annotations, links, rows and panel numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

from deploy.grafana import promql
from deploy.grafana.panels import DATA_SOURCE, Panel

#: Dashboards with this tag link to each other.
TAG = "nanovllm"


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row; its panels fill lines of 24 columns from left to right."""

    title: str
    panels: Sequence[Panel]


def build_dashboard(uid: str, title: str, description: str, rows: Sequence[Row]) -> Dashboard:
    """Puts the rows into a frame."""
    builder = (
        dashboards.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .editable()
        .with_variable(
            dashboards.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(_model_variable())
        .annotation(_restarts())
        .link(_link_to_others())
    )
    panel_id = 0
    for row in rows:
        panel_id += 1
        builder.with_row(dashboards.Row(row.title).id(panel_id))
        for panel in row.panels:
            panel_id += 1
            builder.with_panel(panel.id(panel_id))
    return builder.build()


def _model_variable() -> dashboards.QueryVariable:
    return (
        dashboards.QueryVariable("model_name")
        .label("Model")
        .description("The label model_name, which every metric has.")
        .datasource(DATA_SOURCE)
        .query("label_values(nanovllm_num_requests_running, model_name)")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".+")
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _restarts() -> dashboards.AnnotationQuery:
    # A fixed window: annotation queries know no $__rate_interval.
    restarts = promql.select("nanovllm_executor_restarts_total")
    return (
        dashboards.AnnotationQuery()
        .name("Executor restarts")
        .datasource(DATA_SOURCE)
        .enable(True)
        .icon_color("red")
        .expr(f"increase({restarts}[1m]) > 0")
    )


def _link_to_others() -> dashboards.DashboardLink:
    return (
        dashboards.DashboardLink("nanovllm dashboards")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
        .tooltip("The other dashboard, with the same model and time.")
    )
