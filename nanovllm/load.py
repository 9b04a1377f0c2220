"""Closed-loop load: run requests with a concurrency limit and see how long each took."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nanovllm.aio import AsyncClient
from nanovllm.errors import NanovllmError
from nanovllm.requests import Prompt
from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request to send."""

    prompt: Prompt
    sampling_params: SamplingParams


@dataclass(slots=True)
class RequestTiming:
    """What one request did; times in seconds, `started_s` since the start of the run."""

    started_s: float
    #: Time to the first token; None if none came.
    ttft_s: float | None = None
    e2e_s: float = 0.0
    #: Time between tokens, one entry per token after the first delta. Tokens that came in one delta
    #: share its gap evenly, so that coalescing neither hides nor invents a pause.
    itl_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_deltas: int = 0
    #: Why it failed, or None.
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Distribution of a latency in seconds."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles | None":
        """Returns the percentiles of `values`, interpolated linearly; None if there are none."""
        if not values:
            return None
        p50, p95, p99 = np.percentile(values, [50, 95, 99])
        return cls(float(np.mean(values)), float(p50), float(p95), float(p99))


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Summary of a run."""

    duration_s: float
    num_requests: int
    num_failed: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    #: Output tokens over the time from the first request's start to the last one's end.
    output_tokens_per_s: float
    #: Distributions over requests, over tokens and over requests; None without a sample.
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    e2e_s: Percentiles | None
    #: Messages of failed requests, each once.
    errors: tuple[str, ...]

    @classmethod
    def of(cls, timings: Sequence[RequestTiming]) -> "LoadReport":
        """Summarises the timings; failed requests count for tokens, not for latencies."""
        good = [timing for timing in timings if timing.error is None]
        start_s = min((timing.started_s for timing in timings), default=0.0)
        end_s = max((timing.started_s + timing.e2e_s for timing in timings), default=0.0)
        output_tokens = sum(timing.num_output_tokens for timing in timings)
        duration_s = end_s - start_s
        return cls(
            duration_s=duration_s,
            num_requests=len(timings),
            num_failed=len(timings) - len(good),
            num_prompt_tokens=sum(timing.num_prompt_tokens for timing in timings),
            num_cached_tokens=sum(timing.num_cached_tokens for timing in timings),
            num_output_tokens=output_tokens,
            output_tokens_per_s=output_tokens / duration_s if duration_s > 0 else 0.0,
            ttft_s=Percentiles.of([t.ttft_s for t in good if t.ttft_s is not None]),
            itl_s=Percentiles.of([gap for t in good for gap in t.itl_s]),
            e2e_s=Percentiles.of([t.e2e_s for t in good]),
            errors=tuple(sorted({t.error for t in timings if t.error is not None})),
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns the report for JSON."""
        return asdict(self)


async def run_load(
    client: AsyncClient,
    requests: Sequence[LoadRequest],
    concurrency: int,
    *,
    on_done: Callable[[RequestTiming], None] = lambda timing: None,
) -> list[RequestTiming]:
    """Sends the requests in order, at most `concurrency` at a time.

    A request that fails is recorded in its timing and does not end the run.

    Args:
        client: Where to send them.
        requests: What to send.
        concurrency: Most requests under way at the same time; at least 1.
        on_done: Called with each timing as its request ends.

    Returns:
        One timing per request, in the order of `requests`.

    Raises:
        ValueError: `concurrency` is less than 1.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    timings: dict[int, RequestTiming] = {}
    waiting = iter(enumerate(requests))
    run_start_s = time.perf_counter()

    async def work() -> None:
        for index, request in waiting:
            timings[index] = await _timed(client, request, run_start_s)
            on_done(timings[index])

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(work())
    return [timings[index] for index in range(len(requests))]


async def _timed(client: AsyncClient, request: LoadRequest, run_start_s: float) -> RequestTiming:
    start_s = time.perf_counter()
    timing = RequestTiming(started_s=start_s - run_start_s)
    last_s = start_s
    try:
        async with client.stream(request.prompt, request.sampling_params) as stream:
            async for delta in stream:
                now_s = time.perf_counter()
                num_tokens = len(delta.token_ids)
                if num_tokens:
                    if timing.ttft_s is None:
                        timing.ttft_s = now_s - start_s
                    else:
                        timing.itl_s.extend([(now_s - last_s) / num_tokens] * num_tokens)
                    last_s = now_s
                    timing.num_deltas += 1
                    timing.num_output_tokens += num_tokens
                if delta.usage is not None:
                    timing.num_prompt_tokens = delta.usage.prompt_tokens
                    timing.num_cached_tokens = delta.usage.cached_tokens
    except NanovllmError as error:
        timing.error = f"{type(error).__name__}: {error}"
    timing.e2e_s = time.perf_counter() - start_s
    return timing
