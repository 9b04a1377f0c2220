"""Whether an executor is still there and gets on with its work. Pure: callers pass the time in."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LivenessLimits:
    """What an executor may owe, and for how long."""

    # Without any message, heartbeats included: the process or the network is gone.
    silence_timeout_s: float
    # With heartbeats, but without an iteration that ends although work is there: the device hangs.
    stall_timeout_s: float

    @property
    def heartbeat_interval_s(self) -> float:
        """How often the executor has to send something; several may be late."""
        return self.silence_timeout_s / 5

    @property
    def check_interval_s(self) -> float:
        """How often to ask for a problem."""
        return min(self.silence_timeout_s, self.stall_timeout_s) / 10


class ExecutorLiveness:
    """Two clocks of one session, of which the second stands still while no work is there.

    A process that is stopped or cut off sends nothing. A long iteration does not look like that,
    because heartbeats come from a thread of their own, so the first limit can be short and the
    second as long as the slowest iteration, a compilation of kernels included.
    """

    # Share of either limit after which new work had better go to another executor: by then two
    # heartbeats in a row are late.
    _SUSPICION = 0.4
    # Checks may be late by this many intervals before the fault is this process's own.
    _LATE_INTERVALS = 3

    def __init__(self, limits: LivenessLimits, now_s: float) -> None:
        self._limits = limits
        self._heard_s = now_s
        self._progressed_s = now_s
        self._checked_s = now_s
        self._num_iterations = 0

    def on_results(self, now_s: float) -> None:
        """Step results arrived."""
        self._heard_s = self._progressed_s = now_s

    def on_heartbeat(self, num_iterations: int, now_s: float) -> None:
        """A heartbeat arrived; `num_iterations` is the executor's count of ended iterations."""
        self._heard_s = now_s
        if num_iterations > self._num_iterations:
            self._num_iterations = num_iterations
            self._progressed_s = now_s

    def problem(self, *, has_work: bool, now_s: float) -> str | None:
        """Why the executor counts as lost, or None. To be called every `check_interval_s`."""
        interval_s = self._limits.check_interval_s
        away_s = now_s - self._checked_s
        self._checked_s = now_s
        if away_s > self._LATE_INTERVALS * interval_s:
            # This process was stopped, or too busy to read. What the executor sent lies unread.
            self._heard_s += away_s
            self._progressed_s += away_s
        if not has_work:
            self._progressed_s = now_s
        if now_s - self._heard_s > self._limits.silence_timeout_s:
            return f"sent nothing for {now_s - self._heard_s:.1f} s"
        if now_s - self._progressed_s > self._limits.stall_timeout_s:
            return f"made no progress for {now_s - self._progressed_s:.1f} s"
        return None

    def is_suspect(self, now_s: float) -> bool:
        """Whether so much of a limit has passed that the executor may be about to be lost."""
        silent_s, without_progress_s = now_s - self._heard_s, now_s - self._progressed_s
        return (
            silent_s > self._SUSPICION * self._limits.silence_timeout_s
            or without_progress_s > self._SUSPICION * self._limits.stall_timeout_s
        )
