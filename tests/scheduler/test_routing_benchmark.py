"""The routing benchmark, small: what the router promises, and that the simulation is sound."""

import json
from functools import cache

import pytest

from benchmarks.routing.__main__ import main
from benchmarks.routing.comparison import Comparison, compare, prefix_aware
from benchmarks.routing.simulation import Hardware, Simulation
from benchmarks.routing.strategies import PrefixAware, RoundRobin
from benchmarks.routing.timed_executor import TimedExecutor, TimeModel
from benchmarks.routing.working_set import WorkingSet
from benchmarks.routing.workloads import (
    Conversation,
    Turn,
    Workload,
    bursts,
    hot_prefix,
    multi_turn,
)
from scheduler_service.block_manager import BlockId
from scheduler_service.plan import Admit, Plan
from scheduler_service.router import RoutingPolicy
from scheduler_service.scheduler import ExecutorCapacity, Scheduler, SchedulerPolicy
from scheduler_service.sequence import Sequence, SequenceId, SlotId, SlotSampling, StepId

POLICY = RoutingPolicy()


def hardware(num_blocks: int = 1_536) -> Hardware:
    capacity = ExecutorCapacity(
        num_blocks=num_blocks,
        block_size=16,
        max_num_seqs=32,
        max_num_batched_tokens=1_024,
        max_model_len=8_192,
    )
    return Hardware(4, capacity, TimeModel())


@cache
def conversations() -> Workload:
    return multi_turn("small", 250, starts_per_s=6.0, think_time_s=3.0, seed=2)


@cache
def comparison() -> Comparison:
    return compare(conversations(), hardware(), [POLICY], seed=1)


def test_the_router_hits_nearly_what_a_single_cache_of_the_same_size_hits():
    assert comparison().run("one executor").outcome.stats.prefix_hit_tokens > 0
    assert comparison().working_set_ratio > 0.4
    assert comparison().run(prefix_aware(POLICY)).hit_rate_ratio > 0.95


@pytest.mark.parametrize("other", ["round robin", "least loaded", "random"])
def test_strategies_that_ignore_prefixes_hit_less_and_are_slower(other):
    router, blind = comparison().run(prefix_aware(POLICY)), comparison().run(other)
    assert blind.hit_rate_ratio < router.hit_rate_ratio - 0.1
    assert sum(blind.outcome.ttft_s) > 1.2 * sum(router.outcome.ttft_s)


def test_every_request_of_every_strategy_gets_all_its_tokens():
    turns = [turn for each in conversations().conversations for turn in each.turns]
    for run in comparison().runs:
        assert len(run.outcome.ttft_s) == len(turns)
        assert run.outcome.num_output_tokens == sum(turn.num_output_tokens for turn in turns)


def test_a_hot_prefix_spreads_within_the_bound_and_costs_no_throughput():
    result = compare(hot_prefix("hot", 400, 80.0, seed=1), hardware(2_048), [POLICY], seed=1)
    router = result.run(prefix_aware(POLICY)).outcome
    assert router.max_imbalance <= POLICY.max_imbalance
    assert (
        router.output_tokens_per_s > 0.95 * result.run("one executor").outcome.output_tokens_per_s
    )


def test_requests_of_a_burst_share_the_prefix_that_the_first_of_them_computes():
    result = compare(bursts("bursts", 12, 4.0, seed=1), hardware(2_048), [POLICY], seed=1)
    assert result.run(prefix_aware(POLICY)).hit_rate_ratio > 0.95
    assert result.run("least loaded").hit_rate_ratio < 0.85


def test_the_same_run_twice_has_the_same_outcome():
    def run():
        return Simulation(hardware(), POLICY, PrefixAware()).run(conversations())

    assert run() == run()


def test_a_turn_finds_the_whole_conversation_before_it_in_the_cache():
    one = multi_turn("one", 1, starts_per_s=1.0, think_time_s=1.0, seed=1)
    stats = Simulation(hardware().as_one(), POLICY, RoundRobin()).run(one).stats
    prompts = [turn.num_prompt_tokens for turn in one.conversations[0].turns]
    before = [turn.num_tokens for turn in one.conversations[0].turns[:-1]]
    # All full blocks; the last token of an answer was never fed back.
    assert stats.prefix_hit_tokens == sum((tokens - 1) // 16 * 16 for tokens in before)
    assert stats.prefix_queried_tokens == sum(prompts)


def test_an_iteration_takes_what_the_model_of_time_says():
    capacity = hardware().capacity
    scheduler, executor = Scheduler(SchedulerPolicy()), TimedExecutor(capacity, TimeModel())
    scheduler.attach(capacity)
    assert executor.begin() is None
    scheduler.add(Sequence(SequenceId(0), list(range(500)), max_total_tokens=502))
    executor.plans.append(scheduler.schedule(0.0))
    assert executor.begin() == pytest.approx(0.006 + 500 / 10_000)
    progressed, _ = scheduler.update(executor.end())
    assert executor.begin() == pytest.approx(0.006 + 0.000_05)
    scheduler.update(executor.end())
    assert progressed[0].is_finished
    assert executor.begin() is None


def test_a_row_without_room_pauses_until_it_is_granted_a_block():
    executor = TimedExecutor(hardware().capacity, TimeModel())
    prompt = list(range(16))
    admit = Admit(
        slot=SlotId(0),
        token_ids=prompt,
        block_ids=[BlockId(0)],
        num_cached_tokens=0,
        num_prompt_tokens=len(prompt),
        max_total_tokens=20,
        min_total_tokens=0,
        stop_token_ids=(),
        sampling=SlotSampling(),
    )
    executor.plans.append(Plan(StepId(1), admits=[admit], chunks=[(SlotId(0), 16)]))
    assert executor.begin() is not None
    assert executor.end().slots == [0]
    assert executor.begin() is None
    executor.plans.append(Plan(StepId(2), grants=[(SlotId(0), [BlockId(1)])]))
    assert executor.begin() is not None
    assert executor.end().applied_step_id == 2


def test_an_iteration_that_was_not_begun_cannot_end():
    with pytest.raises(ValueError, match="no iteration"):
        TimedExecutor(hardware().capacity, TimeModel()).end()


def test_the_working_set_counts_common_tokens_once_and_ends_with_the_conversation():
    first, second, third = (
        Conversation(
            number,
            float(number),
            group=0,
            num_shared_tokens=100,
            token_ids=[],
            turns=[Turn(110, 10, 0.0)],
        )
        for number in range(3)
    )
    working_set = WorkingSet()
    working_set.arrive(first, 120, 0.0)
    working_set.arrive(second, 120, 1.0)
    working_set.end(first, 2.0)
    working_set.end(second, 3.0)
    working_set.arrive(third, 120, 4.0)
    # 120 for a second, 140, 120 again, then nothing.
    assert working_set.mean_tokens == pytest.approx((120 + 140 + 120) / 4)


def test_the_command_prints_every_strategy_and_writes_what_it_printed(tmp_path, capsys):
    path = tmp_path / "routing.json"
    assert main(["--scale", "0.01", "--max-imbalance", "2", "4", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(path.read_text())
    for workload in document["workloads"]:
        assert f"{workload['workload']}: {workload['num_requests']} requests" in printed
        names = [run["strategy"] for run in workload["runs"]]
        assert names[:3] == ["one executor", "prefix-aware, bound 2", "prefix-aware, bound 4"]
        assert all(name in printed for name in names)
    assert [cost["num_executors"] for cost in document["choice"]] == [4, 16]
