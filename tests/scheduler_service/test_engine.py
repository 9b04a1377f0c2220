"""Requests from submission to their last delta, and what is left of them then: nothing."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from scheduler_service.errors import (
    DeadlineError,
    DuplicateRequestError,
    InvalidFieldError,
    NeverFitsError,
    QueueFullError,
)
from scheduler_service.plan import StepResult, encode_plan
from scheduler_service.scheduler import ExecutorProtocolError
from scheduler_service.sequence import FinishReason
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler.simulated_executor import expected_output
from tests.scheduler_service.engine_harness import CAPACITY, EngineHarness, ids_of, text_of

PROMPT = [0, 1, 2, 1, 1]
Scenario = Callable[[EngineHarness], Awaitable[None]]


@pytest.fixture
def run(tokenizer: Tokenizer) -> Callable[..., None]:
    """Runs a scenario with a fresh harness, then checks that nothing is left behind."""

    def run_scenario(scenario: Scenario, **options) -> None:
        async def main() -> None:
            harness = EngineHarness(tokenizer, **options)
            await scenario(harness)
            await harness.check_nothing_is_left()

        asyncio.run(main())

    return run_scenario


def expected(prompt: list[int], num_tokens: int) -> list[int]:
    return expected_output(prompt, len(prompt) + num_tokens, ())


def test_a_request_ends_in_one_terminal_delta_with_all_tokens_text_and_usage(run, tokenizer):
    async def scenario(h: EngineHarness) -> None:
        task = h.read(h.submit(PROMPT, max_tokens=20, ignore_eos=True))
        await h.finish(task)
        deltas = task.result()
        assert ids_of(deltas) == expected(PROMPT, 20)
        assert text_of(deltas) == tokenizer.decode(expected(PROMPT, 20))
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        last = deltas[-1]
        assert last.finish_reason is FinishReason.LENGTH
        assert last.stop_reason is None
        assert (last.num_prompt_tokens, last.num_output_tokens) == (5, 20)

    run(scenario)


def test_each_delta_carries_all_tokens_since_the_one_before(run):
    async def scenario(h: EngineHarness) -> None:
        request = h.submit(PROMPT, max_tokens=12, ignore_eos=True)
        deltas = h.engine.deltas(request)
        while not request.completions[0].seq.is_finished:
            await h.step()
        only = await anext(deltas)
        assert only.token_ids == expected(PROMPT, 12)
        assert only.finish_reason is FinishReason.LENGTH
        with pytest.raises(StopAsyncIteration):
            await anext(deltas)

    run(scenario)


def test_completions_of_one_request_are_told_apart_by_index_and_end_once_each(run):
    async def scenario(h: EngineHarness) -> None:
        task = h.read(h.submit(PROMPT, n=3, max_tokens=6, ignore_eos=True))
        await h.finish(task)
        for index in range(3):
            mine = [delta for delta in task.result() if delta.index == index]
            assert ids_of(mine, index) == expected(PROMPT, 6)
            assert [d.finish_reason for d in mine].count(FinishReason.LENGTH) == 1
            assert mine[-1].finish_reason is FinishReason.LENGTH

    run(scenario)


def test_a_stop_token_ends_the_completion_and_has_no_text(run, tokenizer):
    async def scenario(h: EngineHarness) -> None:
        output = expected(PROMPT, 30)
        stop = output[3]
        until_stop = output[: output.index(stop) + 1]
        task = h.read(h.submit(PROMPT, max_tokens=30, stop_token_ids=[stop], ignore_eos=True))
        await h.finish(task)
        deltas = task.result()
        assert ids_of(deltas) == until_stop
        assert text_of(deltas) == tokenizer.decode(until_stop[:-1])
        assert deltas[-1].finish_reason is FinishReason.STOP
        assert deltas[-1].stop_reason == stop

    run(scenario)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_completion_where_it_begins(run, tokenizer, include):
    async def scenario(h: EngineHarness) -> None:
        text = tokenizer.decode(expected(PROMPT, 40))
        stop = text[8:11]
        position = text.index(stop)
        task = h.read(
            h.submit(
                PROMPT,
                max_tokens=40,
                stop=[stop],
                ignore_eos=True,
                include_stop_str_in_output=include,
            )
        )
        await h.finish(task)
        deltas = task.result()
        assert text_of(deltas) == text[: position + (3 if include else 0)]
        assert ids_of(deltas) == expected(PROMPT, 40)[: position + 3]
        assert deltas[-1].finish_reason is FinishReason.STOP
        assert deltas[-1].stop_reason == stop

    run(scenario)


def test_a_stop_string_completed_by_the_last_allowed_token_is_the_reason(run, tokenizer):
    async def scenario(h: EngineHarness) -> None:
        text = tokenizer.decode(expected(PROMPT, 40))
        length = next(n for n in range(4, 40) if text.index(text[n - 4 : n]) == n - 4)
        stop = text[length - 4 : length]
        task = h.read(h.submit(PROMPT, max_tokens=length, stop=[stop], ignore_eos=True))
        await h.finish(task)
        assert task.result()[-1].finish_reason is FinishReason.STOP
        assert task.result()[-1].stop_reason == stop

    run(scenario)


def test_without_detokenize_there_are_ids_and_no_text(run):
    async def scenario(h: EngineHarness) -> None:
        task = h.read(h.submit(PROMPT, max_tokens=5, detokenize=False, ignore_eos=True))
        await h.finish(task)
        assert ids_of(task.result()) == expected(PROMPT, 5)
        assert text_of(task.result()) == ""

    run(scenario)


def test_abort_ends_queued_and_running_requests_with_a_terminal_delta(run):
    async def scenario(h: EngineHarness) -> None:
        tasks = [
            h.read(h.submit(PROMPT, request_id=f"r{i}", max_tokens=100, n=2)) for i in range(6)
        ]
        await h.step()
        await h.step()
        assert h.scheduler.num_waiting > 0
        assert all(h.engine.abort(f"r{i}") for i in range(6))
        await asyncio.gather(*tasks)
        for task in tasks:
            reasons = [delta.finish_reason for delta in task.result() if delta.finish_reason]
            assert reasons == [FinishReason.ABORT] * 2
        assert not h.engine.abort("r0")
        assert not h.engine.abort("never seen")

    run(scenario)


def test_a_reader_that_leaves_frees_everything(run):
    async def scenario(h: EngineHarness) -> None:
        task = h.read(h.submit(PROMPT, n=2, max_tokens=100))
        await h.step()
        assert h.scheduler.num_running == 2
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(scenario)


def test_a_deadline_ends_a_running_request_with_its_error(run):
    async def scenario(h: EngineHarness) -> None:
        task = h.read(h.submit(PROMPT, max_tokens=100), deadline_s=time.monotonic() + 0.02)
        await h.step()
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(task, 10)

    run(scenario)


def test_a_deadline_ends_a_request_that_waits_for_an_executor(run):
    async def scenario(h: EngineHarness) -> None:
        task = h.read(h.submit(PROMPT), deadline_s=time.monotonic())
        with pytest.raises(DeadlineError):
            await asyncio.wait_for(task, 10)

    run(scenario, connect=False)


def test_a_request_id_can_be_used_again_only_after_its_request_ended(run):
    async def scenario(h: EngineHarness) -> None:
        first = h.read(h.submit(PROMPT, request_id="mine", max_tokens=3))
        with pytest.raises(DuplicateRequestError, match="mine"):
            h.submit(PROMPT, request_id="mine")
        await h.finish(first)
        second = h.read(h.submit(PROMPT, request_id="mine", max_tokens=3))
        await h.finish(second)
        assert ids_of(second.result()) == ids_of(first.result())

    run(scenario)


def test_a_full_queue_refuses_with_the_time_to_come_back_and_keeps_nothing(run):
    async def scenario(h: EngineHarness) -> None:
        tasks = [h.read(h.submit(PROMPT, max_tokens=2)) for _ in range(3)]
        with pytest.raises(QueueFullError, match="limit is 3") as caught:
            h.submit(PROMPT, request_id="refused")
        assert caught.value.retry_after_s > 0
        assert not h.engine.abort("refused")
        h.connect()
        await h.finish(*tasks)

    run(scenario, connect=False, max_queued_requests=3)


def test_a_prompt_without_room_for_a_token_is_refused_by_field(run):
    async def scenario(h: EngineHarness) -> None:
        with pytest.raises(InvalidFieldError, match="at most 127"):
            h.submit([1] * CAPACITY.max_model_len)

    run(scenario)


def test_a_request_that_can_never_fit_is_refused_and_one_without_max_tokens_is_content(run):
    async def scenario(h: EngineHarness) -> None:
        h.connect(replace(CAPACITY, num_blocks=8))
        with pytest.raises(NeverFitsError, match="holds 32"):
            h.submit(PROMPT, max_tokens=29)
        task = h.read(h.submit(PROMPT, ignore_eos=True))
        await h.finish(task)
        # The last token is never fed back, so it needs no room.
        assert len(ids_of(task.result())) == 33 - len(PROMPT)

    run(scenario)


def test_the_largest_min_tokens_fits_the_wire(run):
    async def scenario(h: EngineHarness) -> None:
        largest = 2**31 - 1
        task = h.read(h.submit(PROMPT, max_tokens=largest, min_tokens=largest))
        await h.finish(task)
        (admit,) = encode_plan(h.plans[0]).admits
        assert admit.min_total_tokens == admit.max_total_tokens == CAPACITY.max_model_len

    run(scenario)


def test_the_engine_is_idle_only_when_the_last_delta_was_taken(run):
    async def scenario(h: EngineHarness) -> None:
        idle = asyncio.create_task(h.engine.wait_until_idle())
        await asyncio.wait_for(idle, 10)
        request = h.submit(PROMPT, max_tokens=2, ignore_eos=True)
        idle = asyncio.create_task(h.engine.wait_until_idle())
        while not request.is_finished:
            await h.step()
        assert not idle.done()
        await h.finish(h.read(request), idle)

    run(scenario)


def test_a_result_that_breaks_the_protocol_does_not_leave_ended_requests_waiting(run):
    async def scenario(h: EngineHarness) -> None:
        task = h.read(h.submit(PROMPT, max_tokens=1, request_id="done"))
        other = h.read(h.submit(PROMPT, max_tokens=4, request_id="goes on", ignore_eos=True))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        h.executor.run_iteration()
        impossible = StepResult(1, [CAPACITY.max_num_seqs], [0], b"\0")
        with pytest.raises(ExecutorProtocolError):
            h.connection.on_results([*h.executor.results, impossible])
        h.lose_executor()
        assert [d.finish_reason for d in await asyncio.wait_for(task, 10)] == [FinishReason.LENGTH]
        h.connect()
        await h.finish(other)
        assert ids_of(other.result()) == expected(PROMPT, 4)

    run(scenario)
