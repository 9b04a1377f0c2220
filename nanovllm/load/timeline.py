"""A load run over time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanovllm.load.timing import RequestTiming


@dataclass(frozen=True, slots=True)
class TimelinePoint:
    """One interval of a run; its time counts from when the first request was due."""

    start_s: float
    #: Requests that were due, and that ended, in whatever way.
    num_arrivals: int
    num_ends: int
    #: Requests due and not ended when the interval ends.
    num_outstanding: int
    output_tokens_per_s: float
    #: Median of the requests that were due in the interval; None if none of them got a token.
    ttft_p50_s: float | None


def timeline(timings: Sequence[RequestTiming], interval_s: float) -> list[TimelinePoint]:
    """Cuts a run into intervals of `interval_s`; the last one may reach past the run's end.

    Raises:
        ValueError: `interval_s` is not above 0.
    """
    if not interval_s > 0:
        raise ValueError(f"an interval must be longer than 0 s, got {interval_s:g}")
    if not timings:
        return []
    start_s = min(timing.started_s for timing in timings)
    duration_s = max(timing.end_s for timing in timings) - start_s
    # A tiny excess over a whole number is rounding, not another interval.
    num_intervals = max(1, math.ceil(duration_s / interval_s - 1e-9))

    def interval(time_s: npt.ArrayLike) -> npt.NDArray[np.intp]:
        numbers = ((np.asarray(time_s) - start_s) // interval_s).astype(np.intp)
        return np.clip(numbers, 0, num_intervals - 1)

    arrived_in = interval([timing.started_s for timing in timings])
    arrivals = np.bincount(arrived_in, minlength=num_intervals)
    ends = np.bincount(interval([timing.end_s for timing in timings]), minlength=num_intervals)
    outstanding = np.cumsum(arrivals - ends)
    tokens = np.zeros(num_intervals)
    ttfts: list[list[float]] = [[] for _ in range(num_intervals)]
    for timing, arrival in zip(timings, arrived_in, strict=True):
        if timing.ttft_s is None:
            continue
        ttfts[arrival].append(timing.ttft_s)
        times_s, weights = _token_times(timing)
        np.add.at(tokens, interval(times_s), weights)
    return [
        TimelinePoint(
            start_s=number * interval_s,
            num_arrivals=int(arrivals[number]),
            num_ends=int(ends[number]),
            num_outstanding=int(outstanding[number]),
            output_tokens_per_s=float(tokens[number]) / interval_s,
            ttft_p50_s=float(np.median(ttfts[number])) if ttfts[number] else None,
        )
        for number in range(num_intervals)
    ]


def _token_times(
    timing: RequestTiming,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """When the tokens of a request came, since the start of the run, and how many each time."""
    first_s = timing.started_s + (timing.ttft_s or 0.0)
    times_s = first_s + np.concatenate(([0.0], np.cumsum(timing.itl_s)))
    weights = np.ones(len(times_s))
    weights[0] = timing.num_first_tokens
    # Where deltas did not say how many tokens they held, each held the same share of all.
    return times_s, weights * (timing.num_output_tokens / weights.sum())
