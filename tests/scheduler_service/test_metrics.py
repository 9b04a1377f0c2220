"""What /metrics says after requests of a known kind."""

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from scheduler_service.completion import Completion
from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.load import FleetLoad
from scheduler_service.link.round_trips import RoundTrips
from scheduler_service.scheduler import SchedulerPolicy
from scheduler_service.sequence import Sequence, SequenceId
from scheduler_service.telemetry.loop_lag import watch_loop_lag
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.telemetry.request_metrics import RequestMetrics
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler_service.engine_harness import EngineHarness, settle

LABEL = {"model_name": "tiny"}
LIMIT_S = 30


def value(metrics: SchedulerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"nanovllm_{name}", LABEL | labels)


def values(metrics: SchedulerMetrics, name: str, label: str) -> dict[str, float]:
    """Values of a metric by the values of a label."""
    return {
        sample.labels[label]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"nanovllm_{name}"
    }


@pytest.fixture
def metrics() -> SchedulerMetrics:
    return SchedulerMetrics(FleetLoad(Fleet(SchedulerPolicy())), "tiny")


def completion(arrival_s: float = 0.0, num_prompt_tokens: int = 3) -> Completion:
    seq = Sequence(
        SequenceId(0), [1] * num_prompt_tokens, max_total_tokens=100, arrival_s=arrival_s
    )
    return Completion(0, seq, None, None)


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
    ended = values(metrics, "requests_total", "finished_reason")
    assert ended == {"stop": 0, "length": 4, "abort": 1, "error": 0}
    produced = value(metrics, "generation_tokens_total")
    assert produced == 2 * 1 + 2 * 6 + 1
    assert value(metrics, "prompt_tokens_total") == 4 * 4 + 3
    assert value(metrics, "time_to_first_token_seconds_count") == 5
    assert value(metrics, "inter_token_latency_seconds_count") == 2 * 5
    for name in ("e2e_request_latency", "request_queue_time", "request_inference_time"):
        assert value(metrics, f"{name}_seconds_count") == 5
    assert value(metrics, "request_prompt_tokens_sum") == 4 * 4 + 3
    assert value(metrics, "request_generation_tokens_sum") == produced
    # Once per request, not per completion.
    assert value(metrics, "request_params_n_count") == 3
    assert value(metrics, "request_params_n_sum") == 2 + 2 + 1
    assert value(metrics, "request_params_max_tokens_sum") == 1 + 6 + 50
    assert value(metrics, "request_max_num_generation_tokens_sum") == 1 + 6 + 1


def test_a_request_that_gave_no_limit_is_not_counted_with_one(tokenizer: Tokenizer):
    async def main() -> SchedulerMetrics:
        h = EngineHarness(tokenizer)
        h.submit([1, 1, 1], request_id="gone")
        await h.step()
        h.engine.abort("gone")
        return h.metrics

    metrics = asyncio.run(main())
    assert value(metrics, "request_params_n_count") == 1
    assert value(metrics, "request_params_max_tokens_count") == 0


def test_time_before_the_queue_counts_for_the_first_token_and_not_for_the_queue(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    clock = SimpleNamespace(now_s=1000.0)
    modules = ("engine", "live_request", "reservation", "telemetry.request_metrics")
    for module in (*modules, "executors.connection"):
        monkeypatch.setattr(
            f"scheduler_service.{module}.time", SimpleNamespace(monotonic=lambda: clock.now_s)
        )

    async def main() -> SchedulerMetrics:
        h = EngineHarness(tokenizer)
        reserve = h.engine.reserve

        def reserve_and_tokenize(spec):
            reservation = reserve(spec)
            return SlowReservation(reservation)

        class SlowReservation:
            def __init__(self, reservation) -> None:
                self.reservation = reservation

            def __enter__(self):
                entered = self.reservation.__enter__()
                clock.now_s += 4
                return entered

            def __exit__(self, *error) -> None:
                self.reservation.__exit__(*error)

        monkeypatch.setattr(h.engine, "reserve", reserve_and_tokenize)
        task = h.read(h.submit([1, 1, 1], max_tokens=3, ignore_eos=True))
        clock.now_s += 2
        await settle()
        for _ in range(3):
            clock.now_s += 1
            await h.step()
        await h.finish(task)
        return h.metrics

    metrics = asyncio.run(main())
    sums = {
        name: value(metrics, f"{name}_seconds_sum")
        for name in (
            *("time_to_first_token", "e2e_request_latency", "request_queue_time"),
            *("request_prefill_time", "request_decode_time", "request_inference_time"),
            *("inter_token_latency", "request_time_per_output_token"),
        )
    }
    assert sums == {
        "time_to_first_token": 4 + 2 + 1,
        "e2e_request_latency": 4 + 2 + 3,
        "request_queue_time": 2,
        "request_prefill_time": 1,
        "request_decode_time": 2,
        "request_inference_time": 3,
        "inter_token_latency": 2,
        "request_time_per_output_token": 1,
    }


def test_tokens_that_arrive_together_share_the_time_since_the_last_ones(metrics: SchedulerMetrics):
    first, second = completion(), completion(num_prompt_tokens=5)
    first.last_token_s = 10.0
    RequestMetrics(metrics).on_tokens([(first, 4), (second, 2)], 12.0)
    assert value(metrics, "generation_tokens_total") == 6
    assert value(metrics, "prompt_tokens_total") == 5
    assert value(metrics, "time_to_first_token_seconds_sum") == 12
    # Four gaps of half a second, and one of nothing behind a first token.
    assert value(metrics, "inter_token_latency_seconds_count") == 5
    assert value(metrics, "inter_token_latency_seconds_sum") == 2
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.0002") == 1
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.5") == 5


def test_gaps_of_different_length_are_not_mixed(metrics: SchedulerMetrics):
    progress = []
    for last_token_s, count in ((9.0, 1), (9.0, 1), (9.0, 4), (8.0, 1)):
        one = completion()
        one.first_token_s = one.last_token_s = last_token_s
        progress.append((one, count))
    RequestMetrics(metrics).on_tokens(progress, 10.0)
    bucket = {
        le: value(metrics, "inter_token_latency_seconds_bucket", le=le)
        for le in ("0.2", "0.5", "1.0", "2.0")
    }
    assert bucket == {"0.2": 0, "0.5": 4, "1.0": 6, "2.0": 7}
    assert value(metrics, "time_to_first_token_seconds_count") == 0


def test_reasons_are_there_before_anything_happened_so_that_rates_see_the_first(
    metrics: SchedulerMetrics,
):
    rejections = values(metrics, "admission_rejections_total", "reason")
    assert {"invalid_field", "queue_full", "never_fits", "no_executor"} <= rejections.keys()
    metrics.count_rejection("queue_full")
    assert value(metrics, "admission_rejections_total", reason="queue_full") == 1
    moves = values(metrics, "requests_moved_total", "reason")
    assert moves == dict.fromkeys(("lost", "drained", "removed", "rebalanced"), 0)


def test_every_sample_names_the_model_and_every_histogram_is_readable(metrics: SchedulerMetrics):
    metrics.inter_token_latency.observe(0.003, 4)
    families = list(text_string_to_metric_families(generate_latest(metrics.registry).decode()))
    names = {family.name for family in families}
    assert {"nanovllm_build_info", "process_cpu_seconds", "process_resident_memory_bytes"} <= names
    for family in families:
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny", sample
    (latency,) = [f for f in families if f.name == "nanovllm_inter_token_latency_seconds"]
    assert latency.type == "histogram"


def test_plans_are_timed_up_to_the_first_result_that_acknowledges_them():
    times: list[float] = []
    trips = RoundTrips(times.append)
    for step_id in (1, 2, 3):
        trips.sent(step_id, 10.0 + step_id)
    trips.acknowledged(0, 14.0)
    assert times == []
    trips.acknowledged(2, 15.0)
    trips.acknowledged(2, 16.0)
    assert times == [4.0, 3.0]
    trips.acknowledged(3, 17.0)
    assert times == [4.0, 3.0, 4.0]


def test_a_loop_that_was_blocked_is_seen_to_be_late():
    async def main() -> list[float]:
        lags: list[float] = []
        seen = asyncio.Event()

        def observe(lag_s: float) -> None:
            lags.append(lag_s)
            seen.set()

        loop = asyncio.get_running_loop()
        task = asyncio.create_task(watch_loop_lag(observe, interval_s=0.01))
        await asyncio.sleep(0)
        until_s = loop.time() + 0.2
        while loop.time() < until_s:
            pass
        await asyncio.wait_for(seen.wait(), LIMIT_S)
        task.cancel()
        return lags

    lags = asyncio.run(main())
    assert lags[0] >= 0.15
    assert min(lags) >= 0
