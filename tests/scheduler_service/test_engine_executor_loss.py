"""What requests live to see of an executor that comes late, goes away or comes back smaller."""

import asyncio
from dataclasses import replace

import pytest

from scheduler_service.errors import ExecutorFailedError, NeverFitsError, NoExecutorError
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler.simulated_executor import expected_output
from tests.scheduler_service.engine_harness import CAPACITY, EngineHarness, ids_of, settle

PROMPT = [2, 0, 1, 2, 2, 1]


def expected(num_tokens: int) -> list[int]:
    return expected_output(PROMPT, len(PROMPT) + num_tokens, ())


def test_a_lost_executor_costs_a_pause_but_no_token(tokenizer: Tokenizer):
    async def main() -> None:
        h = EngineHarness(tokenizer)
        tasks = [h.read(h.submit(PROMPT, max_tokens=30, ignore_eos=True)) for _ in range(3)]
        for _ in range(2):
            for _ in range(7):
                await h.step()
            h.lose_executor()
            await settle()
            h.connect()
        await h.finish(*tasks)
        for task in tasks:
            assert ids_of(task.result()) == expected(30)
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_requests_wait_for_the_first_executor(tokenizer: Tokenizer):
    async def main() -> None:
        h = EngineHarness(tokenizer, connect=False)
        task = h.read(h.submit(PROMPT, max_tokens=5, ignore_eos=True))
        await settle()
        assert not task.done()
        h.connect()
        await h.finish(task)
        assert ids_of(task.result()) == expected(5)
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_an_executor_absent_for_too_long_fails_waiting_and_new_requests_until_it_comes(
    tokenizer: Tokenizer,
):
    async def main() -> None:
        h = EngineHarness(tokenizer, executor_wait_timeout_s=0.02)
        task = h.read(h.submit(PROMPT, max_tokens=100))
        await h.step()
        h.lose_executor()
        with pytest.raises(NoExecutorError, match="the executor went away") as caught:
            await asyncio.wait_for(task, 10)
        assert caught.value.retry_after_s > 0
        with pytest.raises(NoExecutorError):
            h.submit(PROMPT)
        h.connect()
        again = h.read(h.submit(PROMPT, max_tokens=5, ignore_eos=True))
        await h.finish(again)
        assert ids_of(again.result()) == expected(5)
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_a_finished_request_keeps_what_its_reader_has_not_taken_when_the_executor_stays_away(
    tokenizer: Tokenizer,
):
    async def main() -> None:
        h = EngineHarness(tokenizer, executor_wait_timeout_s=0.02)
        finished = h.submit(PROMPT, max_tokens=3, ignore_eos=True)
        while not finished.is_finished:
            await h.step()
        running = h.read(h.submit(PROMPT, max_tokens=100))
        h.lose_executor()
        with pytest.raises(NoExecutorError):
            await asyncio.wait_for(running, 10)
        assert ids_of(await asyncio.wait_for(h.read(finished), 10)) == expected(3)
        h.connect()
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_a_request_fails_when_it_lost_more_executors_than_it_may(tokenizer: Tokenizer):
    async def main() -> None:
        h = EngineHarness(tokenizer, max_executor_losses=2)
        task = h.read(h.submit(PROMPT, max_tokens=100, n=2))
        for _ in range(2):
            await h.step()
            h.lose_executor()
            h.connect()
        await h.step()
        assert not task.done()
        h.lose_executor()
        with pytest.raises(ExecutorFailedError, match="more than 2 times"):
            await asyncio.wait_for(task, 10)
        h.connect()
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_a_request_that_only_waited_outlives_any_number_of_losses(tokenizer: Tokenizer):
    async def main() -> None:
        h = EngineHarness(tokenizer, connect=False, max_executor_losses=0)
        task = h.read(h.submit(PROMPT, max_tokens=5, ignore_eos=True))
        for _ in range(3):
            h.connect()
            h.lose_executor()
        h.connect()
        await h.finish(task)
        assert ids_of(task.result()) == expected(5)
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_a_smaller_executor_fails_what_cannot_fit_and_serves_the_rest(tokenizer: Tokenizer):
    async def main() -> None:
        h = EngineHarness(tokenizer)
        large = h.read(h.submit(PROMPT, max_tokens=100, n=2, ignore_eos=True))
        small = h.read(h.submit(PROMPT, max_tokens=10, ignore_eos=True))
        await h.step()
        h.lose_executor()
        h.connect(replace(CAPACITY, num_blocks=8))
        with pytest.raises(NeverFitsError, match="holds 32"):
            await asyncio.wait_for(large, 10)
        await h.finish(small)
        assert ids_of(small.result()) == expected(10)
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_a_request_without_max_tokens_takes_what_an_executor_that_comes_later_holds(
    tokenizer: Tokenizer,
):
    async def main() -> None:
        h = EngineHarness(tokenizer, connect=False)
        task = h.read(h.submit(PROMPT, ignore_eos=True))
        h.connect(replace(CAPACITY, num_blocks=8))
        await h.finish(task)
        assert ids_of(task.result()) == expected(33 - len(PROMPT))
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_max_tokens_is_bounded_by_the_length_of_an_executor_that_comes_later(
    tokenizer: Tokenizer,
):
    async def main() -> None:
        h = EngineHarness(tokenizer, connect=False)
        task = h.read(h.submit(PROMPT, max_tokens=200, ignore_eos=True))
        h.connect(replace(CAPACITY, max_model_len=20))
        await h.finish(task)
        assert ids_of(task.result()) == expected(20 - len(PROMPT))
        await h.check_nothing_is_left()

    asyncio.run(main())


def test_a_sequence_longer_than_a_new_executor_takes_fails_with_that_reason(tokenizer: Tokenizer):
    async def main() -> None:
        h = EngineHarness(tokenizer, connect=False)
        task = h.read(h.submit(PROMPT, max_tokens=3))
        h.connect(replace(CAPACITY, max_model_len=5))
        with pytest.raises(NeverFitsError, match="less than 5"):
            await asyncio.wait_for(task, 10)
        await h.check_nothing_is_left()

    asyncio.run(main())
