"""vLLM's names show what our own metrics show, in the form that dashboards for vLLM expect."""

import math

import pytest
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.load import FleetLoad
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy
from scheduler_service.sequence import FinishReason
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.telemetry.metrics.vllm import export_vllm_names, one_two_five

LABELS = {"model_name": "tiny", "engine": "0"}
#: What the dashboards in vLLM's examples/observability query, and what gateways read.
QUERIED = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    *("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_success_total"),
    *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"),
    *("vllm:num_preemptions_total", "vllm:cache_config_info"),
    *(
        f"vllm:{name}_{part}"
        for part in ("bucket", "sum", "count")
        for name in (
            *("time_to_first_token_seconds", "inter_token_latency_seconds"),
            *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
            *("request_queue_time_seconds", "request_prefill_time_seconds"),
            *("request_decode_time_seconds", "request_inference_time_seconds"),
            *("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total"),
            *("request_params_n", "request_params_max_tokens"),
            "request_max_num_generation_tokens",
        )
    ),
}


@pytest.fixture
def metrics() -> SchedulerMetrics:
    """Of a scheduler with an executor."""
    fleet = Fleet(SchedulerPolicy())
    scheduler = fleet.join("unix:/executor").scheduler
    metrics = SchedulerMetrics(FleetLoad(fleet), "tiny")
    export_vllm_names(metrics, 2048)
    scheduler.attach(ExecutorCapacity(64, 16, 8, 60, 128))
    return metrics


def families(metrics: SchedulerMetrics) -> dict[str, Metric]:
    """What a scrape yields under vLLM's names."""
    text = generate_latest(metrics.registry).decode()
    return {
        family.name: family
        for family in text_string_to_metric_families(text)
        if family.name.startswith("vllm:")
    }


def bounds(family: Metric) -> list[float]:
    return [float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels]


def test_everything_that_dashboards_for_vllm_query_is_there(metrics: SchedulerMetrics):
    samples = [sample for family in families(metrics).values() for sample in family.samples]
    assert {sample.name for sample in samples} == QUERIED
    assert all(LABELS.items() <= sample.labels.items() for sample in samples)


def test_types_are_those_of_vllm(metrics: SchedulerMetrics):
    kinds = {name.removeprefix("vllm:"): family.type for name, family in families(metrics).items()}
    assert kinds["num_requests_running"] == kinds["cache_config_info"] == "gauge"
    assert kinds["prompt_tokens"] == kinds["request_success"] == "counter"
    assert kinds["time_to_first_token_seconds"] == kinds["iteration_tokens_total"] == "histogram"


def test_counts_are_our_own(metrics: SchedulerMetrics):
    metrics.prompt_tokens.inc(7)
    metrics.generation_tokens.inc(5)
    metrics.load.members[0].scheduler.stats.num_preemptions = 3
    metrics.count_finished(FinishReason.LENGTH)
    read = metrics.registry.get_sample_value
    assert read("vllm:prompt_tokens_total", LABELS) == 7
    assert read("vllm:generation_tokens_total", LABELS) == 5
    assert read("vllm:num_preemptions_total", LABELS) == 3
    ended = {
        reason: read("vllm:request_success_total", {**LABELS, "finished_reason": reason})
        for reason in ("stop", "length", "abort", "error")
    }
    assert ended == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_observations_are_our_own_in_the_buckets_of_vllm(metrics: SchedulerMetrics):
    for value_s in (0.0003, 0.03, 0.05, 0.06, 30.0):
        metrics.inter_token_latency.observe(value_s, 2)
    family = families(metrics)["vllm:inter_token_latency_seconds"]
    assert bounds(family) == [
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
        *(10.0, 20.0, 40.0, 80.0, math.inf),
    ]
    counts = {
        sample.labels["le"]: sample.value for sample in family.samples if "le" in sample.labels
    }
    assert (counts["0.01"], counts["0.025"], counts["0.05"], counts["0.075"]) == (2, 2, 6, 8)
    assert (counts["20.0"], counts["40.0"], counts["+Inf"]) == (8, 10, 10)
    own = metrics.registry.get_sample_value(
        "nanovllm_inter_token_latency_seconds_bucket", {"model_name": "tiny", "le": "0.05"}
    )
    assert own == 6


def test_bounds_of_the_other_histograms_are_those_of_vllm(metrics: SchedulerMetrics):
    found = {
        name.removeprefix("vllm:"): bounds(family) for name, family in families(metrics).items()
    }
    assert found["time_to_first_token_seconds"][:4] == [0.001, 0.005, 0.01, 0.02]
    assert found["time_to_first_token_seconds"][-3:] == [640.0, 2560.0, math.inf]
    assert found["e2e_request_latency_seconds"][0] == 0.3
    assert found["e2e_request_latency_seconds"][-2] == 7680.0
    assert found["request_params_n"] == [1, 2, 5, 10, 20, math.inf]
    assert found["iteration_tokens_total"][:4] == [1, 8, 16, 32]
    assert found["iteration_tokens_total"][-2] == 16384
    assert found["request_prompt_tokens"][-3:] == [1000, 2000, math.inf]


def test_token_buckets_end_at_the_length_of_the_model():
    assert one_two_five(100) == (1, 2, 5, 10, 20, 50, 100)
    assert one_two_five(99) == (1, 2, 5, 10, 20, 50)
    assert one_two_five(1) == (1,)


def test_gateways_find_the_size_of_the_cache_in_its_labels(metrics: SchedulerMetrics):
    (sample,) = families(metrics)["vllm:cache_config_info"].samples
    assert (sample.labels["block_size"], sample.labels["num_gpu_blocks"]) == ("16", "64")
    assert sample.value == 1


def test_without_the_option_nothing_has_a_name_of_vllm():
    metrics = SchedulerMetrics(FleetLoad(Fleet(SchedulerPolicy())), "tiny")
    assert families(metrics) == {}
