"""Sends one request as its case says and returns what came of it."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from benchmarks.chaos.cases import Behaviour, Case
from nanovllm.aio import AsyncClient
from nanovllm.errors import NanovllmError, RequestCancelledError, UnavailableError
from nanovllm.outputs import Delta, FinishReason
from nanovllm.requests import generate_request

_SLOW_PAUSE_S = 0.02
# A client that does not resume is told these when its server is gone.
_PROMISED_ERRORS = (UnavailableError, RequestCancelledError)


class Ending(Enum):
    """How a request ended for its client."""

    COMPLETE = "complete"
    # By its client's wish.
    LEFT = "left"
    # With an error that the system promises for it.
    BROKEN = "broken"
    # With one that it does not promise.
    FAILED = "failed"
    # Not at all.
    STUCK = "stuck"


@dataclass(slots=True)
class Part:
    """What came of one completion."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    # Prompt and completion tokens of the usage.
    usage: tuple[int, int] | None = None

    def add(self, delta: Delta) -> None:
        """Takes in a delta."""
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.logprobs += [entry.logprob for entry in delta.logprobs]
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason
        if delta.usage is not None:
            self.usage = (delta.usage.prompt_tokens, delta.usage.completion_tokens)


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it."""

    case: Case
    ending: Ending
    parts: dict[int, Part]
    num_resumes: int = 0
    error: str = ""


async def send(
    client: AsyncClient,
    case: Case,
    *,
    limit_s: float,
    on_tokens: Callable[[float], None] = lambda _: None,
) -> Outcome:
    """Runs one request; `on_tokens` is told the time whenever tokens arrive.

    A request of which nothing came for `limit_s` is stuck; how long it takes in all says more about
    the machine.
    """
    outcome = Outcome(case, Ending.COMPLETE, {})
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(limit_s) as limit:

            def on_delta() -> None:
                limit.reschedule(loop.time() + limit_s)

            await _read(client, case, outcome, on_tokens, on_delta)
    except TimeoutError:
        outcome.ending = Ending.STUCK
    except NanovllmError as error:
        is_promised = case.behaviour is Behaviour.FRAGILE and isinstance(error, _PROMISED_ERRORS)
        outcome.ending = Ending.BROKEN if is_promised else Ending.FAILED
        outcome.error = f"{type(error).__name__}: {error}"
    return outcome


async def _read(
    client: AsyncClient,
    case: Case,
    outcome: Outcome,
    on_tokens: Callable[[float], None],
    on_delta: Callable[[], None],
) -> None:
    request = generate_request(
        case.prompt, case.params, request_id=uuid.uuid4().hex, priority=case.priority
    )
    num_tokens = 0
    resume = False if case.behaviour is Behaviour.FRAGILE else None
    async with client.start(request, resume=resume) as stream:
        async for delta in stream:
            on_delta()
            outcome.parts.setdefault(delta.index, Part()).add(delta)
            outcome.num_resumes = stream.num_resumes
            if delta.token_ids:
                on_tokens(time.monotonic())
            acts = num_tokens < case.act_after <= num_tokens + len(delta.token_ids)
            num_tokens += len(delta.token_ids)
            if case.behaviour is Behaviour.READ_SLOWLY:
                await asyncio.sleep(_SLOW_PAUSE_S)
            elif acts and case.behaviour is Behaviour.CANCEL:
                outcome.ending = Ending.LEFT
                return
            elif acts and case.behaviour is Behaviour.ABORT:
                await _abort(client, request.request_id)


async def _abort(client: AsyncClient, request_id: str) -> None:
    # If it does not arrive, the request goes on, which is right too.
    with contextlib.suppress(UnavailableError):
        await client.abort(request_id)
