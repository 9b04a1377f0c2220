"""Every query that we ship, executed by a real Prometheus that watched both real services."""

import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.grafana.local_prometheus import LocalPrometheus
from deploy.grafana.prometheus_api import PrometheusApi, PrometheusError, Series
from deploy.grafana.queries import DashboardSpec, PanelSpec, load_dashboard, substitute
from deploy.grafana.render import TimeRange, render
from nanovllm import Client, LocalServices, NanovllmError, OverloadedError, RequestTooLargeError
from tests.checkpoints import make_checkpoint
from tests.deploy.test_prometheus_rules import needs_promtool, rules
from tests.e2e.support import (
    LIMIT_S,
    greedy,
    metrics_page,
    random_prompt,
    running_services,
    wait_until,
    wait_until_serving,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="prometheus is not installed (Debian: apt-get install prometheus)",
    ),
]

DASHBOARDS = sorted(Path(__file__).parents[2].glob("deploy/grafana/dashboards/*.json"))
SPECS = [load_dashboard(path) for path in DASHBOARDS]
SCHEDULER, EXECUTOR = "nanovllm-scheduler", "nanovllm-executor"
BLOCK_SIZE, NUM_BLOCKS, MAX_QUEUED = 8, 40, 8
INTERVAL_S = 0.5
#: What Grafana would put in; the window covers several scrapes.
VARIABLES = {"model_name": ".+", "__rate_interval": "10s"}
QUERIES = [
    pytest.param(panel, query.expr, id=f"{spec.title}-{panel.kind}-{panel.title}-{query.ref_id}")
    for spec in SPECS
    for panel in spec.panels
    for query in panel.queries
]
#: Panels in which the load below must leave a trace, not merely a series of zeros.
MUST_HAPPEN = {
    "Preemptions",
    "Requests refused, by reason",
    "Prefix cache hit rate",
    "Tokens computed again",
    "Executor restarts",
    "Sessions ended, by reason",
    "Waiting",
    "GPU busy",
    "Prompt tokens in the queue",
    "Plans",
    "Sequences running, by executor",
    "Sequences waiting, by executor",
    "KV cache used, by executor",
    "Sequences sent, by executor",
    "Stream round trip p95, by executor",
}


@dataclass(frozen=True, slots=True)
class Watched:
    """A Prometheus, and the time in which it watched the load."""

    api: PrometheusApi
    services: LocalServices
    start_s: float
    end_s: float

    def over_time(self, expr: str) -> list[Series]:
        """The series of a panel's query over the whole time."""
        return self.api.query_range(
            substitute(expr, VARIABLES), self.start_s, self.end_s, INTERVAL_S
        )


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Both services after an eventful life under the eyes of a Prometheus."""
    folder = tmp_path_factory.mktemp("watched")
    model = make_checkpoint(folder / "tiny-qwen3", "qwen3", max_position_embeddings=4096)
    with running_services(
        model,
        folder / "logs",
        executor=[
            *("--num-kv-blocks", str(NUM_BLOCKS), "--block-size", str(BLOCK_SIZE)),
            *("--max-num-seqs", "6", "--max-num-batched-tokens", "32"),
        ],
        scheduler=[
            *("--max-queued-requests", str(MAX_QUEUED), "--lookahead-tokens", "8"),
            *("--max-executor-losses", "0"),
        ],
        metrics=True,
    ) as services:
        prometheus = LocalPrometheus(
            folder / "prometheus",
            {
                SCHEDULER: metrics_url(services, SCHEDULER),
                EXECUTOR: metrics_url(services, EXECUTOR),
            },
            interval_s=INTERVAL_S,
        )
        with prometheus as api, Client(services.address) as client:
            wait_for_prometheus(lambda: num_scrapes(api) >= 2, "both services were scraped twice")
            start_s = time.time()
            serve_some(client)
            crowd_out(client)
            refuse_and_abort(client, api)
            lose_executor(services, client)
            prometheus.move_target(EXECUTOR, metrics_url(services, EXECUTOR))
            wait_until_serving(client)
            serve_some(client)
            done_s = time.time()
            wait_for_prometheus(
                lambda: num_scrapes(api, since_s=done_s) >= 3, "the last events are scraped"
            )
            yield Watched(api, services, start_s, time.time())


def metrics_url(services: LocalServices, job: str) -> str:
    """Where the service of a job serves its metrics."""
    service = services.scheduler if job == SCHEDULER else services.executor
    assert service.metrics_url is not None
    return service.metrics_url


def wait_for_prometheus(condition: Callable[[], bool], what: str) -> None:
    """Asks Prometheus a few times in each of its intervals."""
    wait_until(condition, what, poll_s=INTERVAL_S / 5)


def num_scrapes(api: PrometheusApi, since_s: float = 0.0) -> int:
    """Successful scrapes of the service that has the fewest in the last minute, after a time."""
    now_s = time.time()
    series = api.query_range("timestamp(up == 1)", max(since_s, now_s - 60), now_s, INTERVAL_S / 2)
    scrapes = {item.labels["job"]: len({t for t in item.values if t > since_s}) for item in series}
    return min(scrapes.get(SCHEDULER, 0), scrapes.get(EXECUTOR, 0))


def serve_some(client: Client) -> None:
    """Ordinary requests, with a prompt that comes twice."""
    for seed in (0, 1, 0):
        client.generate(random_prompt(60, seed=seed), greedy(40))


def crowd_out(client: Client) -> None:
    """Six sequences of which four fill the cache."""
    prompts = [random_prompt(20 + 5 * index, seed=70 + index) for index in range(6)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        list(threads.map(lambda prompt: client.generate(prompt, greedy(80)), prompts))


def refuse_and_abort(client: Client, api: PrometheusApi) -> None:
    """A full queue, a request that can never fit, and two clients that leave."""
    endless = greedy(250, n=6)
    with client.stream(random_prompt(10), endless), client.stream(random_prompt(10), endless):
        wait_until(lambda: client.server_status().num_waiting >= 3, "sequences wait")
        with pytest.raises(OverloadedError):
            client.generate(random_prompt(10), greedy(1, n=MAX_QUEUED))
        # A queue is only there for as long as it is; the counters keep everything else.
        wait_for_prometheus(
            lambda: bool(api.query("nanovllm_num_queued_tokens > 0")), "a scrape saw the queue"
        )
    with pytest.raises(RequestTooLargeError):
        client.generate(random_prompt(10), greedy(BLOCK_SIZE * NUM_BLOCKS))


def lose_executor(services: LocalServices, client: Client) -> None:
    """The executor dies during a request, which may not survive that, and is started again."""
    with client.stream(random_prompt(10), greedy(300)) as stream:
        next(stream)
        services.executor.kill()
        with pytest.raises(NanovllmError):
            list(stream)
    services.executor.wait(LIMIT_S)
    services.executor.restart(LIMIT_S * 4)


@pytest.mark.parametrize(("panel", "expr"), QUERIES)
def test_panel_has_data(watched: Watched, panel: PanelSpec, expr: str) -> None:
    series = watched.over_time(expr)
    assert series, "no series"
    numbers = [value for item in series for value in item.values if math.isfinite(value)]
    assert numbers, "no number in any series"
    if panel.title in MUST_HAPPEN or panel.kind == "heatmap":
        assert max(numbers) > 0


def test_every_panel_that_must_show_the_load_exists() -> None:
    assert {panel.title for spec in SPECS for panel in spec.panels} >= MUST_HAPPEN


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.title)
def test_executor_restart_is_annotated(watched: Watched, spec: DashboardSpec) -> None:
    assert spec.annotations
    for expr in spec.annotations:
        assert any(item.has_data for item in watched.over_time(expr))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.title)
def test_variables_offer_the_model(watched: Watched, spec: DashboardSpec) -> None:
    assert spec.variables
    for query in spec.variables.values():
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
        assert found is not None
        assert watched.api.label_values(found[1], found[2]) == ["tiny-qwen3"]


@pytest.mark.parametrize("rule", rules("record"), ids=lambda rule: rule["record"])
def test_recording_rule_has_data(watched: Watched, rule: dict[str, Any]) -> None:
    for expr in (rule["expr"], rule["record"]):
        assert any(item.has_data for item in watched.api.query(expr)), expr


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_alert_looks_at_metrics_that_exist(watched: Watched, rule: dict[str, Any]) -> None:
    # An alert without a cause is empty. Comparisons that answer 0 or 1 keep their series, and
    # what is absent cannot be counted.
    expr = re.sub(r"([<>=]=|[<>])", r"\1 bool", rule["expr"]).replace("absent(", "count(")
    assert expr != rule["expr"]
    assert any(item.has_data for item in watched.api.query(expr)), expr


def test_prometheus_evaluates_every_rule_without_an_error(watched: Watched) -> None:
    loaded = watched.api.rules()
    assert {rule["name"] for rule in loaded} == (
        {rule["record"] for rule in rules("record")} | {rule["alert"] for rule in rules("alert")}
    )
    assert [(rule["name"], rule["lastError"]) for rule in loaded if rule["health"] != "ok"] == []


@needs_promtool
@pytest.mark.parametrize("job", [SCHEDULER, EXECUTOR])
def test_metrics_page_is_clean(watched: Watched, job: str) -> None:
    page = metrics_page(metrics_url(watched.services, job))
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=page, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_picture_of_a_dashboard_is_drawn_and_small(watched: Watched, tmp_path: Path) -> None:
    over = TimeRange(watched.start_s, watched.end_s, INTERVAL_S)
    (spec,) = (spec for spec in SPECS if spec.title.endswith("serving"))
    picture = tmp_path / "images/serving.png"
    render(watched.api, spec, over, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < 150_000


def test_query_that_prometheus_refuses_is_an_error(watched: Watched) -> None:
    with pytest.raises(PrometheusError, match="parse error"):
        watched.api.query("sum(")
