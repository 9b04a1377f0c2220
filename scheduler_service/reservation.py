"""A request's id and place in the queue while its prompt is being tokenized."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from scheduler_service.admission import Ticket
from scheduler_service.errors import RequestError
from scheduler_service.validation import GenerateSpec, RequestKey


class Reservation:
    """Made by the engine, inside a running event loop, and valid until the engine releases it."""

    def __init__(self, spec: GenerateSpec, ticket: Ticket) -> None:
        self.spec = spec
        self.ticket = ticket
        # Whether the ticket went on to the queued request.
        self.is_submitted = False
        self.arrival_s = time.monotonic()
        # Why the request is over before it was queued, if not by an abort.
        self.error: RequestError | None = None
        self._aborted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def key(self) -> RequestKey:
        """What the engine knows the request by."""
        return self.spec.key

    @property
    def is_aborted(self) -> bool:
        """Whether the request was aborted before it was queued."""
        return self._aborted.done()

    def fail(self, error: RequestError) -> None:
        """Ends the wait for the tokens; the request is not queued any more."""
        self.error = error
        self.abort()

    def abort(self) -> None:
        """Ends the wait for the tokens. Repeating it does nothing."""
        if not self._aborted.done():
            self._aborted.set_result(None)

    async def unless_aborted(self, encoding: Coroutine[Any, Any, list[int]]) -> list[int]:
        """Returns the token ids, or none as soon as the request is aborted.

        Raises what `encoding` raises, unless the request was aborted.
        """
        task = asyncio.create_task(encoding, name="encode prompt")
        try:
            futures: list[asyncio.Future[Any]] = [task, self._aborted]
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            return [] if self.is_aborted else task.result()
        finally:
            task.cancel()
            # Takes an error that came together with the abort; nobody else will.
            await asyncio.gather(task, return_exceptions=True)
