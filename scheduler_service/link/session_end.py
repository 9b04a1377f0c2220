"""Why a session with an executor ended, or why none came about."""

from enum import Enum


class SessionEnd(Enum):
    """Values of the reason label in metrics."""

    # No heartbeat, or no progress although there was work.
    STALLED = "stalled"
    # The stream broke, or the executor ended it for reasons of its own.
    LOST = "lost"
    # A newer scheduler took the executor over.
    FENCED = "fenced"
    # One side broke the protocol.
    PROTOCOL = "protocol"
    # The executor was there, but no session was opened.
    REFUSED = "refused"
    # The scheduler failed.
    BUG = "bug"
