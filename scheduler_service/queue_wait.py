"""How long a new request would wait in the queue. Pure: callers pass the time in.

Costs are in tokens: what a sequence may become at most, prompt and output. Whether sequences end
long before that does not matter, for the same overestimate is in what leaves the queue.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class _Bucket:
    """Departures within a moment of backlogged time; times are on the backlog's own clock."""

    start_s: float
    end_s: float
    num_tokens: int


class DrainRate:
    """Measures how fast the queue empties, from what leaves it while something waits.

    Time without a backlog does not count: an empty queue says nothing about its speed.
    """

    # Long enough to average over the batch, short enough to follow a change of the load.
    _WINDOW_S = 10.0
    _BUCKET_S = 0.1
    # Fewer say too little. They are kept beyond the window too, for slow executors with few slots.
    _MIN_BUCKETS = 3
    _MIN_BACKLOG_S = 0.5
    # After a pause the load may be another one, and the batch is empty.
    _FORGET_AFTER_S = 5.0

    def __init__(self) -> None:
        self._buckets: deque[_Bucket] = deque()
        self._backlog_s = 0.0
        self._last_s = 0.0
        self._is_backlogged = False
        self._num_admitted_seen = 0

    def observe(self, now_s: float, num_waiting_tokens: int, num_admitted_tokens: int) -> None:
        """Takes in the queue as a plan leaves it.

        Args:
            now_s: a time that never goes back.
            num_waiting_tokens: cost of what waits now.
            num_admitted_tokens: cost of everything that ever left the queue for a slot.
        """
        num_left = num_admitted_tokens - self._num_admitted_seen
        self._num_admitted_seen = num_admitted_tokens
        if self._is_backlogged:
            self._backlog_s += now_s - self._last_s
            if num_left:
                self._count(num_left)
        elif num_waiting_tokens and now_s - self._last_s > self._FORGET_AFTER_S:
            self._buckets.clear()
        if self._is_backlogged or num_waiting_tokens:
            self._last_s = now_s
        self._is_backlogged = num_waiting_tokens > 0

    def pause(self, now_s: float) -> None:
        """Nothing can leave the queue for now; how long that lasts says nothing about its speed."""
        self._last_s = now_s
        self._is_backlogged = False

    def tokens_per_s(self, now_s: float) -> float | None:
        """Returns the rate, or None while too little is known."""
        if len(self._buckets) < self._MIN_BUCKETS:
            return None
        clock_s = self._backlog_s + (now_s - self._last_s if self._is_backlogged else 0.0)
        # What left with the first bucket had been waited for before it.
        elapsed_s = clock_s - self._buckets[0].end_s
        if elapsed_s < self._MIN_BACKLOG_S:
            return None
        num_tokens = sum(bucket.num_tokens for bucket in self._buckets)
        return (num_tokens - self._buckets[0].num_tokens) / elapsed_s

    def _count(self, num_tokens: int) -> None:
        newest = self._buckets[-1] if self._buckets else None
        if newest is not None and self._backlog_s - newest.start_s < self._BUCKET_S:
            newest.end_s = self._backlog_s
            newest.num_tokens += num_tokens
            return
        self._buckets.append(_Bucket(self._backlog_s, self._backlog_s, num_tokens))
        oldest_s = self._backlog_s - self._WINDOW_S
        while len(self._buckets) > self._MIN_BUCKETS and self._buckets[0].start_s < oldest_s:
            self._buckets.popleft()


class ServiceTime:
    """Average time from a sequence's admission to its end, over the recent ones."""

    _MAX_SAMPLES = 64

    def __init__(self) -> None:
        self._num_samples = 0
        self._mean_s = 0.0

    @property
    def mean_s(self) -> float | None:
        """The average, or None before anything has ended."""
        return self._mean_s if self._num_samples else None

    def observe(self, duration_s: float) -> None:
        """Takes in one sequence that ran to its end."""
        self._num_samples = min(self._num_samples + 1, self._MAX_SAMPLES)
        self._mean_s += (duration_s - self._mean_s) / self._num_samples


@dataclass(frozen=True, slots=True)
class Load:
    """What runs and waits at one moment."""

    # Cost of what would be served before a new request.
    num_tokens_ahead: int
    num_running_tokens: int
    # Whether the batch has no room: every slot is taken, or there are too few blocks for the next.
    is_full: bool


def expected_wait_s(
    load: Load, drain_tokens_per_s: float | None, service_time_s: float | None
) -> float | None:
    """How long a new request would wait for a slot; None if nothing is known.

    Two estimates, of which the longer counts, because both are blind for one kind of load. What
    was measured lags behind while an empty batch fills up. Little's law (J. D. C. Little, "A Proof
    for the Queuing Formula L = lambda W", Operations Research 9, 1961) takes the rate at which a
    full batch makes room, `num_running_tokens / service_time_s`, and so says nothing of a batch
    that is not full because prefill is what the requests wait for.
    """
    if not load.num_tokens_ahead:
        return 0.0
    estimates = []
    if drain_tokens_per_s:
        estimates.append(load.num_tokens_ahead / drain_tokens_per_s)
    if load.is_full and load.num_running_tokens and service_time_s is not None:
        estimates.append(service_time_s * load.num_tokens_ahead / load.num_running_tokens)
    return max(estimates, default=None)
