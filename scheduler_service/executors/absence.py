"""How long an executor has been missing, and whether that is too long."""

import asyncio
from collections.abc import Callable

from scheduler_service.errors import NoExecutorError


class ExecutorAbsence:
    """A clock that runs while an executor is away; `on_too_long` is called when time is up."""

    # What a client should wait before it asks again; executors restart in seconds.
    _RETRY_AFTER_S = 1.0

    def __init__(self, limit_s: float, on_too_long: Callable[[], None]) -> None:
        self._limit_s = limit_s
        self._on_too_long = on_too_long
        self._timer: asyncio.TimerHandle | None = None
        self.is_too_long = False
        #: Why the executor is not there.
        self.problem = "no executor has connected yet"

    def begin(self) -> None:
        """Starts the clock, from zero."""
        self._stop()
        self._timer = asyncio.get_running_loop().call_later(self._limit_s, self._expire)

    def end(self) -> None:
        """The executor is there, or is not waited for any more."""
        self._stop()
        self.is_too_long = False

    def error(self, *problems_of_others: str) -> NoExecutorError:
        """What requests are told when the time is up."""
        problems = "; ".join(dict.fromkeys((self.problem, *problems_of_others)))
        return NoExecutorError(
            f"no executor for {self._limit_s:g} s: {problems}", self._RETRY_AFTER_S
        )

    def _expire(self) -> None:
        self.is_too_long = True
        self._on_too_long()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
