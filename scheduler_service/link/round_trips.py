"""How long plans take until a result acknowledges them. Pure: callers pass the time in."""

from collections import deque
from collections.abc import Callable


class RoundTrips:
    """Times the plans of one session; `observe` is told of each, in seconds."""

    def __init__(self, observe: Callable[[float], None]) -> None:
        self._observe = observe
        self._on_their_way: deque[tuple[int, float]] = deque()

    def sent(self, step_id: int, now_s: float) -> None:
        """A plan is handed to the stream; in order of step_id."""
        self._on_their_way.append((step_id, now_s))

    def acknowledged(self, step_id: int, now_s: float) -> None:
        """A result says that this plan and all before it were applied."""
        while self._on_their_way and self._on_their_way[0][0] <= step_id:
            _, sent_s = self._on_their_way.popleft()
            self._observe(now_s - sent_s)
