"""What SIGTERM and SIGINT do to a service: the first asks for its end, the second enforces it."""

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType

#: Exit codes of a process that a signal ended are this and the signal's number.
SIGNAL_EXIT_BASE = 128

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Handles both signals from its making on; to be made in the main thread.

    Until `service_is_up` there is nothing to drain, so even the first signal ends the process.
    """

    def __init__(self, address: str, on_first: Callable[[], object]) -> None:
        """Takes the signals over.

        Args:
            address: What the service listens on; its unix socket is removed at a sudden end.
            on_first: Called in the main thread at the first signal; must return at once.
        """
        self._address = address
        self._on_first = on_first
        self._ends_at_next = True
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def service_is_up(self) -> None:
        """From now on the first signal lets the service end in order."""
        self._ends_at_next = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ends_at_next:
            self._end(number)
        self._ends_at_next = True
        self._on_first()

    def _end(self, number: int) -> None:
        if self._address.startswith("unix:"):
            with contextlib.suppress(OSError):
                os.unlink(self._address.removeprefix("unix:"))
        # Not through logging, whose locks the interrupted code may hold.
        os.write(2, f"ended at once by {signal.Signals(number).name}\n".encode())
        os._exit(SIGNAL_EXIT_BASE + number)
