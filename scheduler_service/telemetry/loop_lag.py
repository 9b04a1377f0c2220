"""How late the event loop is, which everything on it has to wait for."""

import asyncio
from collections.abc import Callable

_INTERVAL_S = 0.25


async def watch_loop_lag(observe: Callable[[float], None], interval_s: float = _INTERVAL_S) -> None:
    """Tells `observe`, again and again until cancelled, how late a sleep of `interval_s` ended."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + interval_s
        await asyncio.sleep(interval_s)
        # Timers may fire early by the resolution of the clock.
        observe(max(0.0, loop.time() - due_s))
