"""Bounds log lines that strangers can cause: an overload must not fill the disk."""

import asyncio
from collections import Counter
from collections.abc import Callable

_WINDOW_S = 1.0


class LogBudget:
    """So many lines in a second; of the others only how many there were. On the event loop."""

    def __init__(self, lines_per_s: int, write_rest: Callable[[Counter[str]], None]) -> None:
        """`write_rest` is given the number of lines left out, by reason, if there were any."""
        self._lines_per_s = lines_per_s
        self._write_rest = write_rest
        self._window: asyncio.TimerHandle | None = None
        self._num_written = 0
        self._left_out: Counter[str] = Counter()

    def allows(self, reason: str) -> bool:
        """Whether a line may be written now; if not, it is counted under its reason."""
        if self._window is None:
            self._window = asyncio.get_running_loop().call_later(_WINDOW_S, self._end_window)
            self._num_written = 0
        if self._num_written < self._lines_per_s:
            self._num_written += 1
            return True
        self._left_out[reason] += 1
        return False

    def close(self) -> None:
        """Tells of what was left out so far."""
        if self._window is not None:
            self._window.cancel()
            self._end_window()

    def _end_window(self) -> None:
        self._window = None
        if self._left_out:
            left_out, self._left_out = self._left_out, Counter()
            self._write_rest(left_out)
