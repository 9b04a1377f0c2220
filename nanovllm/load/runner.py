"""Runs sessions, closed loop or open loop, and sees how long each of their requests took."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from itertools import chain

from nanovllm.load.requests import Answer, LoadRequest, Session, next_prompt
from nanovllm.load.target import RequestFailedError, Target
from nanovllm.load.timing import RequestFailure, RequestTiming
from nanovllm.start_tasks import start_tasks

OnDone = Callable[[RequestTiming], None]


def _ignore(timing: RequestTiming) -> None:
    pass


async def run_load(
    target: Target,
    requests: Sequence[LoadRequest],
    concurrency: int,
    *,
    on_done: OnDone = _ignore,
) -> list[RequestTiming]:
    """Sends single requests in order, at most `concurrency` at a time; see `run_closed`."""
    sessions = [Session([request]) for request in requests]
    return await run_closed(target, sessions, concurrency, on_done=on_done)


async def run_closed(
    target: Target,
    sessions: Sequence[Session],
    concurrency: int,
    *,
    on_done: OnDone = _ignore,
) -> list[RequestTiming]:
    """Runs sessions in order, each as soon as one of `concurrency` users is free.

    A request that fails is recorded in its timing and ends its session, but not the run.

    Args:
        target: Where to send the requests.
        sessions: What to send.
        concurrency: Number of users; each has one session, pauses included, at a time.
        on_done: Called with each timing as its request ends.

    Returns:
        One timing per request sent, session after session.

    Raises:
        ValueError: `concurrency` is less than 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    run = _Run(target, len(sessions), None, on_done)
    waiting = iter(enumerate(sessions))

    async def user() -> None:
        for index, session in waiting:
            await run.session(index, session, run.now_s())

    async with asyncio.TaskGroup() as group:
        await start_tasks(group, min(concurrency, len(sessions)), user)
    return run.timings()


async def run_open(
    target: Target,
    sessions: Sequence[Session],
    arrivals_s: Sequence[float],
    *,
    max_outstanding: int | None = None,
    on_done: OnDone = _ignore,
) -> list[RequestTiming]:
    """Starts each session at its own time, whether or not earlier ones have ended.

    Args:
        target: Where to send the requests.
        sessions: What to send.
        arrivals_s: When each session is due, since the start of the run, in order. Its first
            request's latency counts from then, even if it is sent later; that of a later turn
            counts from the end of the pause before it.
        max_outstanding: Most requests under way at the same time; others wait for their turn.
        on_done: Called with each timing as its request ends.

    Returns:
        As `run_closed`.

    Raises:
        ValueError: There is not one arrival for each session, or `max_outstanding` is less than 1.
    """
    if len(arrivals_s) != len(sessions):
        raise ValueError(f"{len(sessions)} sessions came with {len(arrivals_s)} arrivals")
    if max_outstanding is not None and max_outstanding < 1:
        raise ValueError(f"max_outstanding must be at least 1, got {max_outstanding}")
    run = _Run(target, len(sessions), max_outstanding, on_done)
    async with asyncio.TaskGroup() as group:
        for index, (session, due_s) in enumerate(zip(sessions, arrivals_s, strict=True)):
            if (early_s := due_s - run.now_s()) > 0:
                await asyncio.sleep(early_s)
            group.create_task(run.session(index, session, due_s))
    return run.timings()


class _Run:
    """Clock, limit and timings of one run."""

    def __init__(
        self, target: Target, num_sessions: int, max_outstanding: int | None, on_done: OnDone
    ) -> None:
        self._target = target
        self._gate: contextlib.AbstractAsyncContextManager[object] = (
            contextlib.nullcontext()
            if max_outstanding is None
            else asyncio.Semaphore(max_outstanding)
        )
        self._on_done = on_done
        self._timings: list[list[RequestTiming]] = [[] for _ in range(num_sessions)]
        self._start_s = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def timings(self) -> list[RequestTiming]:
        return list(chain.from_iterable(self._timings))

    async def session(self, index: int, session: Session, due_s: float) -> None:
        answer = Answer()
        prompt = session.turns[0].prompt
        for number, turn in enumerate(session.turns):
            if number:
                due_s += turn.think_s
                if (early_s := due_s - self.now_s()) > 0:
                    await asyncio.sleep(early_s)
                prompt = next_prompt(prompt, answer, turn.prompt)
                answer = Answer()
            request = LoadRequest(prompt, turn.sampling_params)
            timing = RequestTiming(started_s=due_s)
            async with self._gate:
                await self._request(request, timing, answer)
            self._timings[index].append(timing)
            self._on_done(timing)
            if timing.failure is not None:
                return
            due_s = timing.end_s

    async def _request(self, request: LoadRequest, timing: RequestTiming, answer: Answer) -> None:
        clock = time.perf_counter
        due_s = self._start_s + timing.started_s
        timing.send_delay_s = max(0.0, clock() - due_s)
        last_s = due_s
        is_complete = False
        try:
            async for piece in self._target.answer(request):
                num_tokens = piece.num_tokens
                if num_tokens:
                    now_s = clock()
                    if timing.ttft_s is None:
                        timing.ttft_s = now_s - due_s
                        timing.num_first_tokens = num_tokens
                    else:
                        timing.itl_s.extend([(now_s - last_s) / num_tokens] * num_tokens)
                    last_s = now_s
                    timing.num_deltas += 1
                    timing.num_output_tokens += num_tokens
                    answer.token_ids.extend(piece.token_ids)
                if piece.text:
                    answer.text.append(piece.text)
                is_complete = is_complete or piece.is_last
                if piece.usage is not None:
                    timing.num_prompt_tokens = piece.usage.prompt_tokens
                    timing.num_cached_tokens = piece.usage.cached_tokens
                    # Deltas that do not say how many tokens they hold may have held more.
                    timing.num_output_tokens = max(
                        timing.num_output_tokens, piece.usage.completion_tokens
                    )
            if not is_complete:
                message = "the stream ended before the answer did"
                timing.failure = RequestFailure("CUT SHORT", message, is_refusal=False)
        except RequestFailedError as error:
            timing.failure = error.failure
        timing.e2e_s = clock() - due_s
