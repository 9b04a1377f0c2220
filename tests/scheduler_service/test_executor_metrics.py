"""What /metrics says of each executor, of those that come and go, and of all together."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.load import FleetLoad
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.telemetry.metrics.vllm import export_vllm_names
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler.simulated_executor import SimulatedExecutor
from tests.scheduler_service.engine_harness import CAPACITY, EngineHarness

FIRST, OTHER = "unix:/executor", "unix:/other"
PROMPT = [0, 1, 2, 1, 2]
Scenario = Callable[[EngineHarness], Awaitable[None]]


@pytest.fixture
def run(tokenizer: Tokenizer) -> Callable[..., None]:
    def run(scenario: Scenario, **options: Any) -> None:
        async def main() -> None:
            await scenario(EngineHarness(tokenizer, **options))

        asyncio.run(main())

    return run


def by_label(metrics: SchedulerMetrics, name: str, label: str, **labels: str) -> dict[str, float]:
    """Samples with these labels, by the value of another one."""
    return {
        sample.labels[label]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"nanovllm_{name}" and labels.items() <= sample.labels.items()
    }


def by_executor(metrics: SchedulerMetrics, name: str, **labels: str) -> dict[str, float]:
    return by_label(metrics, name, "executor", **labels)


def moves(h: EngineHarness) -> dict[str, float]:
    """Sequences that were moved, by those reasons that occurred."""
    found = by_label(h.metrics, "requests_moved_total", "reason")
    return {reason: count for reason, count in found.items() if count}


def submit(h: EngineHarness, number: int, max_tokens: int = 20) -> "asyncio.Task":
    """A request with a prompt of its own."""
    return h.read(h.submit([number, *PROMPT], max_tokens=max_tokens, ignore_eos=True))


def test_gauges_show_an_executor_and_what_waits_there(run):
    async def scenario(h: EngineHarness) -> None:
        task = h.read(h.submit(PROMPT, n=CAPACITY.max_num_seqs + 2, max_tokens=4))
        await h.step()
        assert by_executor(h.metrics, "executor_connected") == {FIRST: 1}
        assert by_executor(h.metrics, "executor_slots") == {FIRST: CAPACITY.max_num_seqs}
        assert by_executor(h.metrics, "num_requests_running") == {FIRST: CAPACITY.max_num_seqs}
        assert by_executor(h.metrics, "num_requests_waiting") == {FIRST: 2, "none": 0}
        assert by_executor(h.metrics, "num_queued_tokens") == {FIRST: 2 * len(PROMPT), "none": 0}
        blocks = by_label(h.metrics, "scheduler_kv_blocks", "state", executor=FIRST)
        assert sum(blocks.values()) == CAPACITY.num_blocks
        assert min(blocks["owned"], blocks["free"]) > 0
        used = by_executor(h.metrics, "kv_cache_usage_ratio")
        assert used == {FIRST: blocks["owned"] / CAPACITY.num_blocks}
        await h.finish(task)
        blocks = by_label(h.metrics, "scheduler_kv_blocks", "state", executor=FIRST)
        assert blocks["owned"] == by_executor(h.metrics, "num_queued_tokens")[FIRST] == 0
        # Prompt blocks stay findable.
        assert blocks["cached"] > 0
        h.lose_executor()
        for name in ("executor_connected", "executor_slots", "kv_cache_usage_ratio"):
            assert by_executor(h.metrics, name) == {FIRST: 0}
        blocks = by_label(h.metrics, "scheduler_kv_blocks", "state", executor=FIRST)
        assert blocks == {"free": 0, "cached": 0, "owned": 0}

    run(scenario)


def test_every_executor_has_values_of_its_own(run):
    async def scenario(h: EngineHarness) -> None:
        h.join(capacity=replace(CAPACITY, max_num_seqs=4))
        tasks = [submit(h, number) for number in range(5)]
        await h.step()
        assert by_executor(h.metrics, "num_requests_running") == {FIRST: 3, OTHER: 2}
        assert by_executor(h.metrics, "requests_routed_total") == {FIRST: 3, OTHER: 2}
        assert by_executor(h.metrics, "executor_slots") == {FIRST: 8, OTHER: 4}
        queried = by_executor(h.metrics, "prefix_cache_queries_total")
        assert queried == {FIRST: 3 * 6, OTHER: 2 * 6}
        used = by_executor(h.metrics, "kv_cache_usage_ratio")
        assert used[FIRST] > used[OTHER] > 0
        await h.finish(*tasks)

    run(scenario)


def test_only_the_executor_that_was_lost_counts_a_restart(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join(capacity=None)
        for _ in range(2):
            h.lose_executor()
            h.connect()
        assert by_executor(h.metrics, "executor_restarts_total") == {FIRST: 2, OTHER: 0}
        other.connect()
        assert by_executor(h.metrics, "executor_restarts_total") == {FIRST: 2, OTHER: 0}

    run(scenario)


def test_what_waits_for_any_executor_is_shown_at_none(run):
    async def scenario(h: EngineHarness) -> None:
        task = submit(h, 0)
        waiting = {FIRST: 0, "none": 1}
        assert by_executor(h.metrics, "num_requests_waiting") == waiting
        assert by_executor(h.metrics, "num_queued_tokens") == {FIRST: 0, "none": 6}
        assert by_executor(h.metrics, "requests_routed_total") == {FIRST: 0}
        h.connect()
        await h.step()
        assert by_executor(h.metrics, "num_requests_waiting") == dict.fromkeys(waiting, 0)
        assert by_executor(h.metrics, "requests_routed_total") == {FIRST: 1}
        # It had no executor before.
        assert moves(h) == {}
        await h.finish(task)

    run(scenario, connect=False)


def test_moves_after_a_loss_are_counted_once_each_and_not_if_nobody_else_is_there(run):
    async def scenario(h: EngineHarness) -> None:
        tasks = [submit(h, number) for number in range(3)]
        await h.step()
        h.lose_executor()
        h.connect()
        assert moves(h) == {}
        await h.step()
        other = h.join()
        h.lose_executor()
        assert moves(h) == {"lost": 3}
        assert by_executor(h.metrics, "requests_routed_total") == {FIRST: 3, OTHER: 3}
        h.connect()
        other.lose()
        assert moves(h) == {"lost": 6}
        await h.finish(*tasks)
        assert moves(h) == {"lost": 6}

    run(scenario)


def test_moves_by_hand_and_for_balance_have_their_own_reasons(run):
    async def scenario(h: EngineHarness) -> None:
        tasks = [submit(h, number) for number in range(24)]
        await h.step()
        h.join()
        assert moves(h) == {"rebalanced": 12}
        assert h.scheduler.num_waiting == 4
        h.pool.drain_executor(FIRST)
        assert moves(h) == {"rebalanced": 12, "drained": 4}
        assert by_executor(h.metrics, "executor_draining") == {FIRST: 1, OTHER: 0}
        h.pool.remove_executor(FIRST)
        h.executor = SimulatedExecutor(CAPACITY)
        assert moves(h) == {"rebalanced": 12, "drained": 4, "removed": 8}
        await h.finish(*tasks)

    run(scenario)


def test_an_executor_that_left_is_not_on_the_page_and_comes_again_with_zeros(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        tasks = [submit(h, number) for number in range(4)]
        await h.finish(*tasks)
        assert by_executor(h.metrics, "prefix_cache_queries_total")[OTHER] == 2 * 6
        h.pool.remove_executor(OTHER)
        h.others.remove(other)
        addresses = {
            sample.labels["executor"]
            for family in h.metrics.registry.collect()
            for sample in family.samples
            if "executor" in sample.labels
        }
        assert addresses == {FIRST, "none"}
        h.join(capacity=None)
        assert by_executor(h.metrics, "prefix_cache_queries_total") == {FIRST: 2 * 6, OTHER: 0}
        assert by_executor(h.metrics, "requests_routed_total") == {FIRST: 2, OTHER: 0}
        assert by_executor(h.metrics, "executor_round_trip_seconds_count") == {FIRST: 0, OTHER: 0}

    run(scenario)


def test_names_of_vllm_show_all_executors_as_one(tokenizer: Tokenizer):
    async def main() -> None:
        h = EngineHarness(tokenizer)
        export_vllm_names(h.metrics, 256)
        h.join(capacity=replace(CAPACITY, num_blocks=32))
        tasks = [submit(h, number) for number in range(18)]
        await h.step()

        def read(name: str) -> float | None:
            labels = {"model_name": "tiny", "engine": "0"}
            return h.metrics.registry.get_sample_value(f"vllm:{name}", labels)

        running = by_executor(h.metrics, "num_requests_running")
        assert read("num_requests_running") == sum(running.values())
        waiting = by_executor(h.metrics, "num_requests_waiting")
        assert min(running.values()) > 0
        assert read("num_requests_waiting") == sum(waiting.values()) == 18 - sum(running.values())
        owned = by_executor(h.metrics, "scheduler_kv_blocks", state="owned")
        assert read("kv_cache_usage_perc") == sum(owned.values()) / (64 + 32)
        await h.finish(*tasks)
        h.pool.remove_executor(OTHER)
        assert read("prefix_cache_queries_total") == 18 * 6

    asyncio.run(main())


def test_no_sum_falls_while_an_executor_leaves():
    readings: list[int] = []

    class WatchedFleet(Fleet):
        """Another thread may read after every assignment."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if "_stats" in self.__dict__:
                readings.append(self.stats.prefix_queried_tokens)

    fleet = WatchedFleet(SchedulerPolicy())
    members = [fleet.join(str(number)) for number in range(3)]
    for member in members:
        member.scheduler.stats.prefix_queried_tokens = 10
    readings.clear()
    for member in members:
        fleet.leave(member)
        fleet.join("again")
    assert readings
    assert set(readings) == {30}


def test_the_cache_of_each_executor_is_described_while_it_is_connected():
    fleet = Fleet(SchedulerPolicy(enable_prefix_caching=False))
    members = [fleet.join(address) for address in (FIRST, OTHER)]
    metrics = SchedulerMetrics(FleetLoad(fleet), "tiny")
    assert by_executor(metrics, "cache_config_info") == {}
    for member in members:
        member.scheduler.attach(ExecutorCapacity(64, 4, 8, 60, 128))
    labels = {
        "block_size": "4",
        "num_kv_blocks": "64",
        "enable_prefix_caching": "False",
        "max_num_seqs": "8",
        "max_num_batched_tokens": "60",
        "max_model_len": "128",
    }
    assert by_executor(metrics, "cache_config_info", **labels) == {FIRST: 1, OTHER: 1}


def test_sessions_end_by_reasons_that_are_there_before_the_first():
    fleet = Fleet(SchedulerPolicy())
    fleet.join(FIRST)
    metrics = SchedulerMetrics(FleetLoad(fleet), "tiny")
    ends = by_label(metrics, "executor_sessions_ended_total", "reason", executor=FIRST)
    assert ends == dict.fromkeys(("stalled", "lost", "fenced", "protocol", "refused", "bug"), 0)
