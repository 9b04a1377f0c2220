"""Many requests over one call of GenerateMany, on one event loop."""

import asyncio
import itertools
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.rpc import status_pb2

from nanovllm.channel import MAX_MESSAGE_BYTES
from nanovllm.trace_context import trace_metadata
from nanovllm.v1 import inference_pb2 as pb

# Messages are filled up to here; what is larger has one of its own.
_FULL_MESSAGE_BYTES = 1 << 20
# A message adds a tag and a length of at most four bytes to the request that it holds.
_MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - 8
# How much later than the server, which should say it, the client ends a request whose time is over.
_SERVER_LEAD_S = 0.2
# A call that is older takes no more requests.
_MAX_AGE_S = 60.0
_STATUS_DETAILS = "grpc-status-details-bin"


class SharedCall:
    """Takes the place of Generate: every request gets an object that behaves like its call.

    There is one call of GenerateMany under them. If it breaks, all requests on it fail, and the
    next request opens another. So does the first request after a minute, while the older call lives
    until its requests have ended: servers may limit how long a connection lives, and check a token
    when a call begins.
    """

    def __init__(self, open_call: Callable[[], Any]) -> None:
        """`open_call` starts a call of GenerateMany."""
        self._open_call = open_call
        self._carrier: _Carrier | None = None
        self._retired: set[_Carrier] = set()

    def generate(self, request: pb.GenerateRequest, timeout_s: float | None) -> "NumberedCall":
        """Starts a request; `timeout_s` limits it alone."""
        if self._carrier is not None and (self._carrier.is_over or self._carrier.is_old):
            self._carrier.retire()
            self._retired = {each for each in (*self._retired, self._carrier) if not each.is_over}
            self._carrier = None
        if self._carrier is None:
            self._carrier = _Carrier(self._open_call())
        return self._carrier.start(request, timeout_s)

    def close(self) -> None:
        """Cancels the requests."""
        for carrier in self._retired:
            carrier.close()
        if self._carrier is not None:
            self._carrier.close()


class NumberedCall(AsyncIterator[pb.GenerateResponse]):
    """The answer to one request, read and cancelled like a call of its own.

    Responses that nobody reads wait here.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._responses: deque[pb.GenerateResponse] = deque()
        self._changed = asyncio.Event()
        self._is_over = False
        self._error: grpc.aio.AioRpcError | None = None
        self._expiry: asyncio.TimerHandle | None = None

    async def __anext__(self) -> pb.GenerateResponse:
        while not self._responses:
            if self._error is not None:
                raise self._error
            if self._is_over:
                raise StopAsyncIteration
            self._changed.clear()
            try:
                await self._changed.wait()
            except asyncio.CancelledError:
                self.cancel()
                raise
        return self._responses.popleft()

    def cancel(self) -> None:
        """Ends the request unless it has ended."""
        if not self._is_over:
            self._responses.clear()
            self._cancel_with(_error(grpc.StatusCode.CANCELLED, "the request was cancelled"))

    def expire_in(self, timeout_s: float) -> None:
        """Ends the request after some time, whatever the server does."""
        error = _error(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline of the request passed")
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(timeout_s, self._cancel_with, error)

    def receive(self, response: pb.NumberedResponse) -> None:
        """Takes what the server sent under the request's number."""
        if response.HasField("response"):
            self._responses.append(response.response)
        if response.HasField("failure"):
            self._error = _failure(response.failure)
        if response.is_last:
            self._end()
        self._changed.set()

    def fail(self, error: grpc.aio.AioRpcError) -> None:
        """Nothing more comes, and why."""
        self._error = error
        self._end()
        self._changed.set()

    def _cancel_with(self, error: grpc.aio.AioRpcError) -> None:
        self.fail(error)
        self._cancel()

    def _end(self) -> None:
        self._is_over = True
        if self._expiry is not None:
            self._expiry.cancel()


class _Carrier:
    """One call of GenerateMany, from its start to its end."""

    def __init__(self, call: Any) -> None:
        self.is_over = False
        self._call = call
        self._started_s = time.monotonic()
        self._is_retired = False
        self._numbers = itertools.count(1)
        # Those that have not ended, by number.
        self._live: dict[int, NumberedCall] = {}
        # What the server does not know yet.
        self._starts: OrderedDict[int, pb.NumberedRequest] = OrderedDict()
        self._cancels: list[int] = []
        self._has_news = asyncio.Event()
        self._writer = asyncio.create_task(self._write(), name="write many requests")
        self._reader = asyncio.create_task(self._read(), name="read many answers")

    def start(self, request: pb.GenerateRequest, timeout_s: float | None) -> NumberedCall:
        number = next(self._numbers)
        call = NumberedCall(lambda: self._cancel(number))
        if timeout_s is not None and not timeout_s > 0:
            call.fail(_error(grpc.StatusCode.DEADLINE_EXCEEDED, "no time was left to begin with"))
            return call
        start = pb.NumberedRequest(
            number=number, request=request, timeout_s=timeout_s, metadata=dict(trace_metadata())
        )
        if start.ByteSize() > _MAX_REQUEST_BYTES:
            # gRPC would end the call with it, and the other requests.
            message = f"the request has {start.ByteSize()} bytes; at most {_MAX_REQUEST_BYTES} fit"
            call.fail(_error(grpc.StatusCode.RESOURCE_EXHAUSTED, message))
            return call
        if timeout_s is not None:
            call.expire_in(timeout_s + _SERVER_LEAD_S)
        self._live[number] = call
        self._starts[number] = start
        self._has_news.set()
        return call

    @property
    def is_old(self) -> bool:
        return time.monotonic() - self._started_s >= _MAX_AGE_S

    def retire(self) -> None:
        """No request is started any more; the call ends with the last of those that live."""
        self._is_retired = True
        self._end_if_done()

    def close(self) -> None:
        self._end(_error(grpc.StatusCode.CANCELLED, "the connection was closed"))

    def _end_if_done(self) -> None:
        if self._is_retired and not self._live:
            self.close()

    def _cancel(self, number: int) -> None:
        if self._live.pop(number, None) is None:
            return
        if self._starts.pop(number, None) is None:
            self._cancels.append(number)
            self._has_news.set()
        # The end of the call cancels what is left of it on the server, too.
        self._end_if_done()

    def _end(self, error: grpc.aio.AioRpcError) -> None:
        self.is_over = True
        self._call.cancel()
        self._writer.cancel()
        self._reader.cancel()
        for call in self._live.values():
            call.fail(error)
        self._live.clear()

    async def _write(self) -> None:
        try:
            while True:
                await self._has_news.wait()
                self._has_news.clear()
                while self._starts or self._cancels:
                    await self._call.write(self._next_message())
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass  # the call has ended; its reader gets to know why
        except asyncio.CancelledError:
            self._end(_error(grpc.StatusCode.CANCELLED, "the connection's task was cancelled"))
            raise
        except Exception as error:
            self._end(_error(grpc.StatusCode.INTERNAL, f"the requests cannot be sent: {error}"))

    def _next_message(self) -> pb.GenerateManyRequest:
        message = pb.GenerateManyRequest(cancels=self._cancels)
        self._cancels.clear()
        num_bytes = message.ByteSize()
        while self._starts:
            number, start = self._starts.popitem(last=False)
            num_bytes += start.ByteSize()
            if num_bytes > _FULL_MESSAGE_BYTES and (message.starts or message.cancels):
                self._starts[number] = start
                self._starts.move_to_end(number, last=False)
                break
            message.starts.append(start)
        return message

    async def _read(self) -> None:
        try:
            async for message in self._call:
                for response in message.responses:
                    call = self._live.get(response.number)
                    if call is None:
                        continue  # cancelled meanwhile
                    if response.is_last:
                        del self._live[response.number]
                    call.receive(response)
                self._end_if_done()
        except grpc.aio.AioRpcError as error:
            self._end(error)
        except asyncio.CancelledError:
            self._end(_error(grpc.StatusCode.CANCELLED, "the connection's task was cancelled"))
            raise
        except Exception as error:
            self._end(_error(grpc.StatusCode.INTERNAL, f"the answers cannot be read: {error}"))
        else:
            self._end(_error(grpc.StatusCode.UNAVAILABLE, "the server ended the call"))


def _error(code: grpc.StatusCode, message: str, trailer: bytes = b"") -> grpc.aio.AioRpcError:
    details = ((_STATUS_DETAILS, trailer),) if trailer else ()
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*details), message)


def _failure(failure: pb.RequestFailure) -> grpc.aio.AioRpcError:
    """The error that a call of its own would have ended with."""
    code = _CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
    status = status_pb2.Status(code=failure.code, message=failure.message, details=failure.details)
    return _error(code, failure.message, status.SerializeToString())


_CODES = {code.value[0]: code for code in grpc.StatusCode}
