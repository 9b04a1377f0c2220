"""A server of GenerateMany that does what a test tells it to, call by call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.rpc import status_pb2

from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc as pb_grpc

INFO = pb.ResumeInfo(prompt_token_ids=[4, 5, 6], model_fingerprint="f" * 64)


class Peer:
    """The server's side of one call of GenerateMany."""

    def __init__(self, requests: AsyncIterator[pb.GenerateManyRequest], context: Any) -> None:
        self.metadata = dict(context.invocation_metadata())
        self.context = context
        #: What has arrived.
        self.messages: list[pb.GenerateManyRequest] = []
        self.starts: list[pb.NumberedRequest] = []
        self.cancels: list[int] = []
        #: Set when the client has cancelled the call.
        self.is_cancelled = asyncio.Event()
        self._requests = requests

    async def take(self, num_starts: int = 0, num_cancels: int = 0) -> None:
        """Reads until so many starts and cancels have arrived."""
        while len(self.starts) < num_starts or len(self.cancels) < num_cancels:
            message = await anext(aiter(self._requests), None)
            if message is None:
                await self.stay()  # the client is gone, and this call about to be cancelled
                return
            self.messages.append(message)
            self.starts += message.starts
            self.cancels += message.cancels

    async def say(self, number: int, text: str, *, end: bool = False, info: bool = False) -> None:
        await self.send(
            pb.NumberedResponse(number=number, response=delta(text, end, info), is_last=end)
        )

    async def fail(self, number: int, status: status_pb2.Status) -> None:
        failure = pb.RequestFailure(
            code=status.code, message=status.message, details=status.details
        )
        await self.send(pb.NumberedResponse(number=number, failure=failure, is_last=True))

    async def send(self, *responses: pb.NumberedResponse) -> None:
        await self.context.write(pb.GenerateManyResponse(responses=responses))

    async def answer_all(self) -> None:
        """Answers every request with its own prompt until the client closes the call."""
        while True:
            await self.take(len(self.starts) + 1)
            for start in self.starts:
                await self.say(start.number, start.request.text, end=True)
            self.starts.clear()

    async def stay(self) -> None:
        """Does nothing until the client cancels the call."""
        await asyncio.Event().wait()


def delta(text: str, end: bool = False, info: bool = False) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        text=text,
        token_ids=list(text.encode()),
        finish_reason=pb.FINISH_REASON_LENGTH if end else pb.FINISH_REASON_UNSPECIFIED,
        usage=pb.Usage(prompt_tokens=3, completion_tokens=9) if end else None,
        resume_info=INFO if info else None,
    )


Script = Callable[[Peer], Awaitable[None]]


class Scripted(pb_grpc.InferenceServiceServicer):
    """Plays the i-th script in the i-th call."""

    def __init__(self, address: str, scripts: tuple[Script, ...]) -> None:
        self.address = address
        self.peers: list[Peer] = []
        self._scripts = list(scripts)

    async def GenerateMany(self, requests: Any, context: Any) -> None:  # noqa: N802
        peer = Peer(requests, context)
        self.peers.append(peer)
        try:
            await self._scripts.pop(0)(peer)
        except asyncio.CancelledError:
            peer.is_cancelled.set()
            raise


@asynccontextmanager
async def scripted(address: str, *scripts: Script) -> AsyncIterator[Scripted]:
    service = Scripted(address, scripts)
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    pb_grpc.add_InferenceServiceServicer_to_server(service, server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield service
    finally:
        await server.stop(None)
