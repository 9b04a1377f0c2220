"""Several executors under one engine: where requests go, what they see of comings and goings."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from nanovllm.v1 import inference_pb2
from scheduler_service.errors import ExecutorFailedError, NeverFitsError, NoExecutorError
from scheduler_service.executors.pool import (
    ExecutorKnownError,
    LastExecutorError,
    UnknownExecutorError,
)
from scheduler_service.live_request import LiveRequest
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler.simulated_executor import SimulatedExecutor, expected_output
from tests.scheduler_service.engine_harness import (
    CAPACITY,
    MODEL,
    EngineHarness,
    OtherExecutor,
    ids_of,
    settle,
)

PROMPT = [2, 0, 1, 2, 2, 1]
SMALL = replace(CAPACITY, num_blocks=8)
Scenario = Callable[[EngineHarness], Awaitable[None]]


@pytest.fixture
def run(tokenizer: Tokenizer) -> Callable[..., None]:
    """Runs a scenario and checks that it leaves nothing behind."""

    def run(scenario: Scenario, **options: Any) -> None:
        async def main() -> None:
            h = EngineHarness(tokenizer, **options)
            await scenario(h)
            await h.check_nothing_is_left()

        asyncio.run(main())

    return run


def expected(num_tokens: int, prompt: list[int] = PROMPT) -> list[int]:
    return expected_output(prompt, len(prompt) + num_tokens, ())


def submit(h: EngineHarness, max_tokens: int, prompt: list[int] = PROMPT, n: int = 1) -> Any:
    return h.submit(prompt, max_tokens=max_tokens, ignore_eos=True, n=n)


def places(request: LiveRequest) -> set[int | None]:
    """Indices of the executors that have the request's sequences."""
    return {completion.seq.executor for completion in request.completions}


def index(other: OtherExecutor) -> int:
    return other.connection.member.index


def test_requests_of_a_lost_executor_go_on_at_the_others_at_once(run):
    async def scenario(h: EngineHarness) -> None:
        h.join()
        prompts = [[number, *PROMPT] for number in range(10)]
        requests = [submit(h, 30, prompt) for prompt in prompts]
        assert {place for request in requests for place in places(request)} == {0, 1}
        tasks = [h.read(request) for request in requests]
        for _ in range(7):
            await h.step()
        h.lose_executor()
        await h.finish(*tasks)
        for task, prompt in zip(tasks, prompts, strict=True):
            assert ids_of(task.result()) == expected(30, prompt)
        assert {place for request in requests for place in places(request)} == {1}
        h.connect()

    run(scenario)


def test_a_request_goes_where_its_prefix_is_cached(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        h.pool.drain_executor("unix:/executor")
        prompt = [7] * 40
        await h.finish(h.read(submit(h, 3, prompt)))
        h.pool.undrain_executor("unix:/executor")
        # The other one is busier by then, but has the prefix.
        longer = submit(h, 30, [*prompt, 1, 2])
        stranger = submit(h, 3, [9] * 40)
        assert places(longer) == {index(other)}
        assert places(stranger) == {0}
        await h.finish(h.read(longer), h.read(stranger))
        assert longer.completions[0].seq.num_cached_tokens == 40

    run(scenario)


def test_completions_of_one_request_stay_together(run):
    async def scenario(h: EngineHarness) -> None:
        h.join()
        requests = [submit(h, 5, [number] * 20, n=4) for number in range(2)]
        assert [places(request) for request in requests] == [{0}, {1}]
        await h.finish(*map(h.read, requests))

    run(scenario)


def test_requests_that_waited_for_any_executor_go_to_the_first_that_comes(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join(capacity=None)
        limited, unlimited = submit(h, 5), h.submit(PROMPT, ignore_eos=True)
        assert places(limited) == {None}
        assert h.pool.load.num_waiting == 2
        other.connect(replace(SMALL, block_size=5))
        tasks = [h.read(limited), h.read(unlimited)]
        await h.finish(*tasks)
        assert ids_of(tasks[0].result()) == expected(5)
        # As many tokens as the cache of that executor holds, and one that needs no room.
        assert ids_of(tasks[1].result()) == expected(8 * 5 + 1 - len(PROMPT))

    run(scenario, connect=False)


def test_what_fits_nowhere_else_waits_for_its_own_executor(run):
    async def scenario(h: EngineHarness) -> None:
        h.join(capacity=SMALL)
        large = submit(h, 100)
        assert places(large) == {0}
        task = h.read(large)
        for _ in range(5):
            await h.step()
        h.lose_executor()
        await h.finish(h.read(submit(h, 10)))
        assert places(large) == {0}
        assert not task.done()
        h.connect()
        await h.finish(task)
        assert ids_of(task.result()) == expected(100)

    run(scenario)


def test_an_executor_that_stays_away_fails_only_what_nobody_else_can_run(run):
    async def scenario(h: EngineHarness) -> None:
        h.join(capacity=SMALL)
        large, small = h.read(submit(h, 100)), h.read(submit(h, 10))
        await h.step()
        h.lose_executor()
        with pytest.raises(NoExecutorError, match="the executor went away"):
            await asyncio.wait_for(large, 10)
        await h.finish(small)
        assert ids_of(small.result()) == expected(10)
        await h.finish(h.read(submit(h, 10)))

    run(scenario, executor_wait_timeout_s=0.02)


def test_new_requests_are_refused_only_when_every_executor_was_away_for_too_long(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        h.lose_executor()
        await asyncio.wait_for(_absent(h.connection), 10)
        await h.finish(h.read(submit(h, 3)))
        other.lose()
        waiting = h.read(submit(h, 3))
        with pytest.raises(NoExecutorError):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(NoExecutorError, match=r"the executor .* away; the other executor .*"):
            submit(h, 3)
        other.connect()
        await h.finish(h.read(submit(h, 3)))

    run(scenario, executor_wait_timeout_s=0.02)


async def _absent(connection: Any) -> None:
    while not connection.absence.is_too_long:
        await asyncio.sleep(0.005)


def test_losses_of_different_executors_count_together(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        task = h.read(submit(h, 100))
        await h.step()
        h.lose_executor()
        await h.step()
        h.connect()
        other.lose()
        await h.step()
        assert not task.done()
        h.lose_executor()
        with pytest.raises(ExecutorFailedError, match="more than 2 times"):
            await asyncio.wait_for(task, 10)

    run(scenario, max_executor_losses=2)


def test_an_executor_that_comes_takes_over_waiting_sequences(run):
    async def scenario(h: EngineHarness) -> None:
        requests = [submit(h, 20, [number, *PROMPT]) for number in range(24)]
        tasks = [h.read(request) for request in requests]
        await h.step()
        assert (h.scheduler.num_running, h.scheduler.num_waiting) == (8, 16)
        other = h.join()
        # The most urgent of those that waited, up to equal numbers.
        assert (h.scheduler.num_waiting, other.scheduler.num_waiting) == (4, 12)
        assert [places(request) for request in requests[8:20]] == [{1}] * 12
        await h.finish(*tasks)
        for number, task in enumerate(tasks):
            assert ids_of(task.result()) == expected(20, [number, *PROMPT])

    run(scenario)


def test_a_drained_executor_ends_what_it_runs_and_gets_nothing_new(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        h.pool.drain_executor("unix:/other")
        old = submit(h, 30)
        assert places(old) == {0}
        task = h.read(old)
        await h.step()
        h.pool.undrain_executor("unix:/other")
        h.pool.drain_executor("unix:/executor")
        new = submit(h, 5)
        assert places(new) == {index(other)}
        await h.finish(task, h.read(new))
        assert places(old) == {0}
        assert old.completions[0].seq.num_preemptions == 0

    run(scenario)


def test_what_waits_at_an_executor_that_is_drained_goes_elsewhere(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        requests = [submit(h, 10, [number, *PROMPT]) for number in range(24)]
        await h.step()
        assert (h.scheduler.num_waiting, other.scheduler.num_waiting) == (4, 4)
        h.pool.drain_executor("unix:/executor")
        assert (h.scheduler.num_waiting, other.scheduler.num_waiting) == (0, 8)
        assert h.scheduler.num_running == 8
        await h.finish(*map(h.read, requests))

    run(scenario)


def test_when_every_executor_is_drained_requests_are_refused_until_one_is_not(run):
    async def scenario(h: EngineHarness) -> None:
        running = h.read(submit(h, 10))
        await h.step()
        h.pool.drain_executor("unix:/executor")
        with pytest.raises(NoExecutorError, match="drained"):
            submit(h, 3)
        await h.finish(running)
        assert ids_of(running.result()) == expected(10)
        h.pool.undrain_executor("unix:/executor")
        await h.finish(h.read(submit(h, 3)))

    run(scenario)


def test_requests_of_a_removed_executor_go_on_elsewhere_and_that_is_no_loss(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        task = h.read(submit(h, 30))
        await h.step()
        stats = h.pool.load.stats
        h.pool.remove_executor("unix:/executor")
        # Results of the iteration that was under way come too late.
        await h.step()
        h.executor = SimulatedExecutor(CAPACITY)
        await h.finish(task)
        assert ids_of(task.result()) == expected(30)
        # Counters of the process never fall.
        assert h.pool.load.stats.prefix_queried_tokens >= stats.prefix_queried_tokens > 0
        assert [each.address for each in h.pool.executors()] == ["unix:/other"]
        assert other.scheduler.stats.recomputed_tokens > 0

    run(scenario, max_executor_losses=0)


def test_what_only_a_removed_executor_could_hold_fails_with_the_reason(run):
    async def scenario(h: EngineHarness) -> None:
        h.join(capacity=SMALL)
        large = h.read(submit(h, 100))
        await h.step()
        h.pool.remove_executor("unix:/executor")
        h.executor = SimulatedExecutor(CAPACITY)
        with pytest.raises(NeverFitsError, match="holds 32"):
            await asyncio.wait_for(large, 10)

    run(scenario)


def test_the_last_executor_that_takes_requests_stays(run):
    async def scenario(h: EngineHarness) -> None:
        with pytest.raises(LastExecutorError, match="add another"):
            h.pool.remove_executor("unix:/executor")
        h.join()
        h.pool.drain_executor("unix:/other")
        with pytest.raises(LastExecutorError):
            h.pool.remove_executor("unix:/executor")
        h.pool.remove_executor("unix:/other")

    run(scenario)


def test_the_only_connected_executor_stays_when_the_others_were_given_up(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join(capacity=None)
        task = h.read(submit(h, 20))
        await h.step()
        async with asyncio.timeout(10):
            while not other.connection.absence.is_too_long:
                await asyncio.sleep(0.005)
        with pytest.raises(LastExecutorError, match="wait until it is connected"):
            h.pool.remove_executor("unix:/executor")
        await h.finish(task)
        assert ids_of(task.result()) == expected(20)
        # One that is not there itself may go, whoever else is there.
        h.pool.remove_executor("unix:/other")
        h.others.remove(other)

    run(scenario, executor_wait_timeout_s=0.02)


def test_a_request_without_a_limit_goes_on_at_a_smaller_executor_when_its_own_is_removed(run):
    async def scenario(h: EngineHarness) -> None:
        h.join(capacity=SMALL)
        request = h.submit(PROMPT, ignore_eos=True)
        assert places(request) == {0}
        task = h.read(request)
        await h.step()
        h.pool.remove_executor("unix:/executor")
        h.executor = SimulatedExecutor(CAPACITY)
        await h.finish(task)
        assert ids_of(task.result()) == expected(33 - len(PROMPT))

    run(scenario)


def test_a_request_without_a_limit_goes_on_at_a_smaller_executor_when_its_own_stays_away(run):
    async def scenario(h: EngineHarness) -> None:
        h.join(capacity=SMALL)
        task = h.read(h.submit(PROMPT, ignore_eos=True))
        await h.step()
        h.lose_executor()
        await h.finish(task)
        assert ids_of(task.result()) == expected(33 - len(PROMPT))

    run(scenario, executor_wait_timeout_s=0.02)


def test_limits_are_those_of_executors_that_take_requests(run):
    async def scenario(h: EngineHarness) -> None:
        h.join(capacity=SMALL)
        h.pool.drain_executor("unix:/executor")
        task = h.read(h.submit(PROMPT, ignore_eos=True))
        await h.finish(task)
        assert ids_of(task.result()) == expected(33 - len(PROMPT))
        with pytest.raises(NeverFitsError, match="holds 32"):
            submit(h, 100)

    run(scenario)


def test_a_resumed_request_whose_completions_got_unequally_far_leaves_the_queues_right(run):
    async def scenario(h: EngineHarness) -> None:
        h.join()
        tasks = [h.read(submit(h, 100, [number] * 4)) for number in range(15)]
        for _ in range(3):
            await h.step()
        received = inference_pb2.ReceivedCompletion(index=0, token_ids=[65] * 60, num_text_chars=60)
        resume = inference_pb2.Resume(
            key=7, model_fingerprint=MODEL.fingerprint, completions=[received]
        )
        request = h.submit(PROMPT, max_tokens=100, ignore_eos=True, n=4, seed=1, resume=resume)
        tasks.append(h.read(request))
        for _ in range(6):
            await h.step()
        assert all(member.scheduler.num_queued_tokens >= 0 for member in h.pool.fleet.members)
        tasks += [h.read(submit(h, 5, [number, *[3] * 7])) for number in range(10)]
        await h.finish(*tasks)
        assert all(task.exception() is None for task in tasks)

    run(scenario)


def test_executors_are_known_by_their_addresses(run):
    async def scenario(h: EngineHarness) -> None:
        with pytest.raises(ExecutorKnownError, match="unix:/executor"):
            h.pool.add_executor("unix:/executor")
        for change in (h.pool.drain_executor, h.pool.undrain_executor, h.pool.remove_executor):
            with pytest.raises(UnknownExecutorError, match="there are unix:/executor"):
                change("unix:/elsewhere")

    run(scenario)


def test_executors_are_described_with_their_work_and_their_problems(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join(capacity=None)
        other.connection.on_disconnected("it serves another model")
        task = h.read(submit(h, 30, n=2))
        await h.step()
        first, second = h.pool.executors()
        assert (first.address, first.num_running, first.problem) == ("unix:/executor", 2, None)
        assert (first.info.device, first.num_kv_blocks) == ("simulated", 64)
        assert 0 < first.num_free_kv_blocks < 64
        assert not second.is_connected
        assert second.problem == "it serves another model"
        assert second.num_kv_blocks == 0
        h.pool.drain_executor("unix:/other")
        assert [each.is_draining for each in h.pool.executors()] == [False, True]
        await h.finish(task)

    run(scenario)


def test_an_executor_that_owes_a_sign_of_life_is_avoided_while_there_is_another(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        h.connection.on_suspicion(True)
        first = submit(h, 5)
        assert places(first) == {index(other)}
        other.connection.on_suspicion(True)
        second = submit(h, 5, [1, 2, 3])
        assert places(second) == {0}
        await h.finish(h.read(first), h.read(second))
        other.lose()
        other.connect()
        third = submit(h, 5, [1, 2, 3, 4])
        assert places(third) == {index(other)}
        await h.finish(h.read(third))

    run(scenario)


def test_a_request_may_be_as_long_as_the_largest_executor_allows(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join(capacity=replace(CAPACITY, max_model_len=200))
        assert h.engine.max_model_len == 200
        longest = submit(h, 250)
        assert places(longest) == {index(other)}
        await h.finish(h.read(longest))
        assert len(longest.completions[0].seq.token_ids) == 200
        other.lose()
        assert h.engine.max_model_len == CAPACITY.max_model_len

    run(scenario)


def test_idle_executors_are_told_nothing(run):
    async def scenario(h: EngineHarness) -> None:
        other = h.join()
        await h.finish(h.read(submit(h, 10)))
        await settle()
        assert other.executor is not None
        assert not other.executor.plans
        assert other.scheduler.stats.prefix_queried_tokens == 0

    run(scenario)
