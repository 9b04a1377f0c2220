"""A GenerateMany call: its requests live side by side, and share the messages of their answers."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterable
from dataclasses import dataclass

from nanovllm.v1 import inference_pb2
from scheduler_service.access.interception import log_failure
from scheduler_service.answering import Context, write
from scheduler_service.engine import Engine
from scheduler_service.errors import (
    CallTooOldError,
    DeadlineError,
    InvalidFieldError,
    RequestError,
    SlowReaderError,
)
from scheduler_service.intake import Intake
from scheduler_service.live_request import LiveRequest, RequestGroup
from scheduler_service.responses import generate_response, request_failure, resume_info
from scheduler_service.telemetry.call_record import GENERATE_MANY, CallRecord
from scheduler_service.telemetry.request_observer import RequestObserver

# A message ends behind the request or the delta with which it reaches one of these. Making a delta
# takes tens of microseconds, most of it for text, and meanwhile results and plans wait.
_MAX_REQUESTS_PER_MESSAGE = 32
_MAX_MESSAGE_BYTES = 1 << 20
# While more wait for the transport, no requests are started: refusing them costs next to nothing,
# and a client that reads no answers could fill the memory with them.
_MAX_UNSENT_FAILURES = 1024
# A caller's token is checked when a call begins, so one that was removed is good for this long.
_MAX_AGE_S = 600.0
# Of a message of many; admitting a request takes a few hundred microseconds.
_MAX_STARTS_PER_TURN = 8


@dataclass(slots=True)
class _Answer:
    """A request that is queued or runs."""

    number: int
    call: CallRecord
    # Done when the last response is on its way, or with the error that ends the request.
    ended: asyncio.Future[None]
    # Goes with the first response.
    resume_info: inference_pb2.ResumeInfo | None = None


class ManyAnswers:
    """The requests of one call.

    Each has a task that lives as long as the request does, so that cancelling and failing work as
    they do for a call of Generate; but it only waits. One more task makes and writes the deltas of
    all of them. While it waits for the transport, the next deltas grow.
    """

    def __init__(
        self,
        context: Context,
        engine: Engine,
        intake: Intake,
        observer: RequestObserver,
        write_timeout_s: float,
    ) -> None:
        self._context = context
        self._engine = engine
        self._intake = intake
        self._observer = observer
        self._write_timeout_s = write_timeout_s
        self._started_s = time.monotonic()
        remaining_s = context.time_remaining()
        self._deadline_s = None if remaining_s is None else time.monotonic() + remaining_s
        self._group = RequestGroup()
        # By number, from their start until the message with their last response is made, if there
        # is to be one: its client may use the number again before their task gets its turn.
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._answers: dict[LiveRequest, _Answer] = {}
        self._failures: deque[inference_pb2.NumberedResponse] = deque()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_closed = False

    async def serve(self, messages: AsyncIterable[inference_pb2.GenerateManyRequest]) -> None:
        """Answers until the client has closed its side and every request has ended.

        Raises:
            RequestError: The client does not read, or broke a rule of the call; it ends the call.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write_all(), name="write many answers")
                async for message in messages:
                    for number in message.cancels:
                        if number in self._tasks:
                            self._tasks[number].cancel()
                    for index, start in enumerate(message.starts, 1):
                        self._start(start, tasks)
                        if index % _MAX_STARTS_PER_TURN == 0:
                            # Other work of the loop is not held up by a message of many requests.
                            await asyncio.sleep(0)
                            await self._has_room.wait()
                    await self._has_room.wait()
                self._is_closed = True
                self._group.changed.set()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _start(self, start: inference_pb2.NumberedRequest, tasks: asyncio.TaskGroup) -> None:
        number = start.number
        if number in self._tasks:
            raise InvalidFieldError(
                "starts.number", f"{number} names a live request of this call; choose another"
            )
        task = tasks.create_task(self._answer(start), name="answer of many")
        self._tasks[number] = task
        task.add_done_callback(lambda task: self._on_done(number, task))

    def _on_done(self, number: int, task: asyncio.Task[None]) -> None:
        if task.cancelled() and self._tasks.get(number) is task:
            del self._tasks[number]
        self._group.changed.set()

    async def _answer(self, start: inference_pb2.NumberedRequest) -> None:
        """Keeps a request alive until it has ended."""
        try:
            try:
                await self._observed(start)
            except RequestError as error:
                self._add_failure(start.number, error)
        except Exception:
            # A bug that one request brings out must not end the others.
            self._add_failure(start.number, RequestError(log_failure(GENERATE_MANY)))

    async def _observed(self, start: inference_pb2.NumberedRequest) -> None:
        with self._observer.observe(start.request, self._context, GENERATE_MANY) as call:
            if start.metadata and call.keeps_history:
                call.metadata = tuple(start.metadata.items())
            try:
                with self._intake.counting_refusals():
                    self._check_age()
                    deadline_s = self._deadline_of(start)
                    live = await self._admit(start, call, deadline_s)
                await self._until_ended(start, live, call, deadline_s)
            except RequestError as error:
                call.fail(error)
                raise

    def _check_age(self) -> None:
        if time.monotonic() - self._started_s >= _MAX_AGE_S:
            raise CallTooOldError(
                f"a call takes new requests for {_MAX_AGE_S:g} s; open another one", 0.0
            )

    def _add_failure(self, number: int, error: RequestError) -> None:
        self._failures.append(
            inference_pb2.NumberedResponse(
                number=number, failure=request_failure(error), is_last=True
            )
        )
        if len(self._failures) >= _MAX_UNSENT_FAILURES:
            self._has_room.clear()

    def _deadline_of(self, start: inference_pb2.NumberedRequest) -> float | None:
        if not start.HasField("timeout_s"):
            return self._deadline_s
        if not start.timeout_s > 0:
            raise InvalidFieldError("starts.timeout_s", "must be above 0, or unset for no limit")
        own_s = time.monotonic() + start.timeout_s
        return own_s if self._deadline_s is None else min(own_s, self._deadline_s)

    async def _admit(
        self, start: inference_pb2.NumberedRequest, call: CallRecord, deadline_s: float | None
    ) -> LiveRequest:
        try:
            # gRPC sees to the deadline of the call alone.
            async with asyncio.timeout_at(deadline_s):
                return await self._intake.admit(start.request, call, deadline_s)
        except TimeoutError as error:
            raise DeadlineError("the deadline passed while the prompt was encoded") from error

    async def _until_ended(
        self,
        start: inference_pb2.NumberedRequest,
        live: LiveRequest,
        call: CallRecord,
        deadline_s: float | None,
    ) -> None:
        loop = asyncio.get_running_loop()
        answer = _Answer(start.number, call, loop.create_future())
        self._answers[live] = answer
        live.group = self._group
        expiry = None
        try:
            answer.resume_info = resume_info(start.request, live, self._engine.model.fingerprint)
            # It may have ended already: aborted while it was tokenized, or resumed behind its end.
            self._group.note(live)
            self._group.changed.set()
            if deadline_s is not None:
                expiry = loop.call_at(deadline_s, self._engine.expire, live)
            await answer.ended
        finally:
            if expiry is not None:
                expiry.cancel()
            self._engine.end(live)
            self._group.forget(live)
            del self._answers[live]

    async def _write_all(self) -> None:
        try:
            while True:
                await self._group.changed.wait()
                self._group.changed.clear()
                while (response := self._next_response()).responses:
                    await write(self._context, response, self._write_timeout_s)
                if self._is_closed and not self._tasks:
                    return
        except SlowReaderError as error:
            # What ends each of the requests, for their log lines; else they would be cancelled.
            for answer in self._answers.values():
                _fail(answer, SlowReaderError(str(error)))
            raise

    def _next_response(self) -> inference_pb2.GenerateManyResponse:
        """What is new of as many requests as fit into a message; empty if nothing is."""
        response = inference_pb2.GenerateManyResponse()
        num_bytes = num_requests = 0
        while num_requests < _MAX_REQUESTS_PER_MESSAGE and num_bytes < _MAX_MESSAGE_BYTES:
            if self._failures:
                failure = self._failures.popleft()
                response.responses.append(failure)
                del self._tasks[failure.number]
                num_new_bytes = failure.ByteSize()
            elif (live := self._group.take()) is not None:
                num_new_bytes = self._add_news(live, response, _MAX_MESSAGE_BYTES - num_bytes)
            else:
                break
            num_bytes += num_new_bytes
            num_requests += num_new_bytes > 0
        if len(self._failures) < _MAX_UNSENT_FAILURES:
            self._has_room.set()
        return response

    def _add_news(
        self, live: LiveRequest, response: inference_pb2.GenerateManyResponse, max_bytes: int
    ) -> int:
        """Adds deltas of a request until they reach `max_bytes`; returns their size in bytes."""
        answer = self._answers[live]
        num_bytes = 0
        try:
            for delta in self._engine.new_deltas(live):
                item = response.responses.add(
                    number=answer.number, response=generate_response(live.request_id, delta)
                )
                if answer.resume_info is not None:
                    item.response.resume_info.CopyFrom(answer.resume_info)
                    answer.resume_info = None
                if answer.call.texts is not None:
                    answer.call.texts.add(delta)
                num_bytes += item.ByteSize()
                if num_bytes >= max_bytes:
                    # Its other completions may have more.
                    self._group.note(live)
                    break
        except Exception as error:
            _fail(answer, error)
            return num_bytes
        if live.is_answered and not answer.ended.done():
            response.responses[-1].is_last = True
            answer.ended.set_result(None)
            del self._tasks[answer.number]
        return num_bytes


def _fail(answer: _Answer, error: Exception) -> None:
    if not answer.ended.done():
        answer.ended.set_exception(error)
