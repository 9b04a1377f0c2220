"""What /metrics says after requests of a known kind."""

import asyncio
import math

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from scheduler_service.metrics import SchedulerMetrics, TokenLatencyHistogram
from scheduler_service.scheduler import Scheduler, SchedulerPolicy
from scheduler_service.tokenizer import Tokenizer
from tests.scheduler_service.engine_harness import EngineHarness

LABEL = {"model_name": "tiny"}


def value(metrics: SchedulerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"nanovllm_{name}", LABEL | labels)


def test_finished_requests_are_counted_with_their_tokens_and_times(tokenizer: Tokenizer):
    async def main() -> SchedulerMetrics:
        h = EngineHarness(tokenizer)
        tasks = [h.read(h.submit([0, 1, 2, 1], max_tokens=n, n=2, ignore_eos=True)) for n in (1, 6)]
        await h.finish(*tasks)
        h.submit([1, 1, 1], request_id="gone", max_tokens=50)
        await h.step()
        h.engine.abort("gone")
        await h.step()
        return h.metrics

    metrics = asyncio.run(main())
    assert value(metrics, "requests_total", finished_reason="length") == 4
    assert value(metrics, "requests_total", finished_reason="abort") == 1
    produced = value(metrics, "generation_tokens_total")
    assert produced == 2 * 1 + 2 * 6 + 1
    assert value(metrics, "time_to_first_token_seconds_count") == 5
    assert value(metrics, "inter_token_latency_seconds_count") == 2 * 5
    assert value(metrics, "e2e_request_latency_seconds_count") == 5
    assert value(metrics, "request_prompt_tokens_sum") == 4 * 4 + 3
    assert value(metrics, "request_generation_tokens_sum") == produced
    assert value(metrics, "num_requests_running") == 0
    assert value(metrics, "kv_cache_usage_ratio") == 0


def test_sessions_after_the_first_count_as_restarts(tokenizer: Tokenizer):
    async def main() -> SchedulerMetrics:
        h = EngineHarness(tokenizer)
        for _ in range(2):
            h.lose_executor()
            h.connect()
        return h.metrics

    assert value(asyncio.run(main()), "executor_restarts_total") == 2


def test_the_exposition_is_complete_and_readable():
    metrics = SchedulerMetrics(Scheduler(SchedulerPolicy()), "tiny")
    metrics.count_rejection("queue_full")
    metrics.inter_token_latency.observe(0.003, 4)
    text = generate_latest(metrics.registry).decode()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {
        *("nanovllm_time_to_first_token_seconds", "nanovllm_inter_token_latency_seconds"),
        *("nanovllm_e2e_request_latency_seconds", "nanovllm_request_queue_time_seconds"),
        *("nanovllm_request_prefill_time_seconds", "nanovllm_request_decode_time_seconds"),
        *("nanovllm_request_prompt_tokens", "nanovllm_request_generation_tokens"),
        *("nanovllm_iteration_tokens", "nanovllm_num_requests_running"),
        *("nanovllm_num_requests_waiting", "nanovllm_kv_cache_usage_ratio"),
        *("nanovllm_prefix_cache_queries", "nanovllm_prefix_cache_hits"),
        *("nanovllm_num_preemptions", "nanovllm_prompt_tokens", "nanovllm_generation_tokens"),
        *("nanovllm_admission_rejections", "nanovllm_executor_restarts"),
        "nanovllm_recomputed_tokens",
    } <= names


def test_many_equal_observations_land_in_one_bucket():
    histogram = TokenLatencyHistogram("latency_seconds", "Test.", "tiny")
    histogram.observe(0.002, 3)
    histogram.observe(0.0021, 2)
    histogram.observe(1e9, 1)
    (family,) = histogram.collect()
    buckets = {
        float(sample.labels["le"]): sample.value
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }
    # Bounds are inclusive, and buckets are cumulative.
    assert (buckets[0.001], buckets[0.002], buckets[0.005]) == (0, 3, 5)
    assert buckets[100.0] == 5
    assert buckets[math.inf] == 6
    total = {sample.name: sample.value for sample in family.samples if "le" not in sample.labels}
    assert total["latency_seconds_count"] == 6
