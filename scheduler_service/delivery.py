"""Telling requests of new tokens, one in each turn of the event loop."""

import asyncio
from collections import deque
from typing import Protocol


class Reader(Protocol):
    """Somebody who waits to be told of a change."""

    is_queued: bool
    changed: asyncio.Event


class DeliveryQueue:
    """Wakes readers in order, on the running event loop.

    A reader that was told makes and writes a delta at once; with hundreds in the same turn, results
    and plans would wait for all of them. Accepting a call takes gRPC several turns, so that even
    with a few in each, the last of many calls that come at once would be accepted seconds late.
    """

    def __init__(self) -> None:
        self._waiting: deque[Reader] = deque()

    def tell(self, reader: Reader) -> None:
        """Lets a reader know soon that it may have something to send."""
        if reader.is_queued:
            return
        reader.is_queued = True
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._deliver)
        self._waiting.append(reader)

    def _deliver(self) -> None:
        reader = self._waiting.popleft()
        reader.is_queued = False
        reader.changed.set()
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._deliver)
