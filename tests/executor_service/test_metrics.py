"""What the executor's /metrics says of its iterations, its memory and its start."""

from dataclasses import replace

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from executor_service.metrics import ExecutorMetrics, StepKind, StepRecord
from executor_service.session import Session
from nanovllm.service_metrics import process_age_s
from nanovllm.v1 import executor_pb2


@pytest.fixture
def metrics() -> ExecutorMetrics:
    return ExecutorMetrics("tiny")


def value(metrics: ExecutorMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"nanovllm_{name}", {"model_name": "tiny", **labels})


def step(num_sequences: int, **changes) -> StepRecord:
    decode = StepRecord(
        kind=StepKind.DECODE,
        num_sequences=num_sequences,
        num_tokens=num_sequences,
        busy_s=0.25,
        idle_s=0.5,
        from_graph=False,
    )
    return replace(decode, **changes)


@pytest.mark.parametrize(
    ("num_sequences", "batch"),
    [
        *((1, "1"), (2, "2-8"), (8, "2-8"), (9, "9-64"), (64, "9-64")),
        *((65, "65-256"), (256, "65-256"), (257, ">256"), (4096, ">256")),
    ],
)
def test_iterations_are_sorted_by_their_number_of_sequences(
    metrics: ExecutorMetrics, num_sequences: int, batch: str
):
    metrics.record_step(step(num_sequences))
    assert value(metrics, "step_duration_seconds_count", kind="decode", batch=batch) == 1


def test_an_iteration_adds_to_time_tokens_and_replays(metrics: ExecutorMetrics):
    metrics.record_step(step(3, from_graph=True))
    metrics.record_step(step(2, kind=StepKind.MIXED, num_tokens=40))
    assert value(metrics, "gpu_busy_seconds_total") == 0.5
    assert value(metrics, "gpu_idle_seconds_total") == 1.0
    assert value(metrics, "cuda_graph_replays_total") == 1
    tokens = {kind: value(metrics, "step_tokens_total", kind=kind) for kind in ("decode", "mixed")}
    assert tokens == {"decode": 3, "mixed": 40}
    assert value(metrics, "step_tokens_total", kind="prefill") == 0


def test_every_kind_and_batch_is_there_before_the_first_iteration(metrics: ExecutorMetrics):
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    (durations,) = [f for f in families if f.name == "nanovllm_step_duration_seconds"]
    series = {
        (sample.labels["kind"], sample.labels["batch"])
        for sample in durations.samples
        if sample.name.endswith("_count")
    }
    assert len(series) == 3 * 5


def test_memory_is_divided_by_its_use(metrics: ExecutorMetrics):
    assert value(metrics, "gpu_memory_bytes", kind="weights") is None
    reserved = [1000]
    metrics.watch_gpu_memory(
        weight_bytes=600, kv_cache_bytes=300, read_reserved_bytes=lambda: reserved[0]
    )

    def kinds() -> list[float | None]:
        return [
            value(metrics, "gpu_memory_bytes", kind=kind)
            for kind in ("weights", "kv_cache", "other")
        ]

    assert kinds() == [600, 300, 100]
    reserved[0] = 1500
    assert kinds() == [600, 300, 600]


def test_start_and_occupied_slots_are_shown(metrics: ExecutorMetrics):
    assert value(metrics, "startup_seconds") is None
    metrics.set_start(model_load_s=1.5, startup_s=4.0)
    assert value(metrics, "model_load_seconds") == 1.5
    assert value(metrics, "startup_seconds") == 4.0
    metrics.watch_slots(lambda: 3)
    assert value(metrics, "slots_active") == 3


def test_the_age_of_the_process_grows_from_its_start():
    first_s = process_age_s()
    assert 0 < first_s <= process_age_s()


def test_results_are_timed_from_their_end_to_their_departure():
    delays: list[float] = []
    session = Session(1, on_delay=delays.append)
    session.put(executor_pb2.StepResult(iteration=1), finished_s=0.0)
    # The answer to a plan that left nothing to run belongs to no iteration.
    session.put(executor_pb2.StepResult(applied_step_id=2))
    session.put(executor_pb2.StepResult(iteration=2), finished_s=1.0)
    message = session.take()
    assert message is not None
    assert len(message.results) == 3
    first_s, second_s = delays
    assert first_s - second_s == pytest.approx(1.0)
    assert second_s > 0
