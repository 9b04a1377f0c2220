"""The asyncio client."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanovllm.access import Access
from nanovllm.channel import UNARY_TIMEOUT_S, check_address
from nanovllm.errors import NanovllmError, RequestCancelledError, client_error
from nanovllm.outputs import Delta, OutputFolder, RequestOutput
from nanovllm.requests import Prompt, detokenize_request, generate_request, tokenize_request
from nanovllm.resume import (
    GenerateCall,
    ResumableRequest,
    ResumePolicy,
    Server,
    resume_policy,
)
from nanovllm.sampling_params import SamplingParams
from nanovllm.server_info import Health, ModelInfo, ServerStatus
from nanovllm.shared_call import SharedCall
from nanovllm.tls import TlsConfig
from nanovllm.trace_context import trace_metadata
from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc as pb_grpc


class AsyncDeltaStream(AsyncIterator[Delta]):
    """The deltas of one request, in order.

    Closing it, leaving its `async with` block, cancelling the task that iterates, or dropping the
    last reference to it before the end cancels the request on the server. Iterating raises the
    errors that `Client.generate` lists.
    """

    def __init__(self, call: Any, request_id: str, address: str) -> None:
        self._call = call
        self._responses = aiter(call)
        self._address = address
        #: Names the request for `AsyncClient.abort`.
        self.request_id = request_id

    @property
    def num_resumes(self) -> int:
        """How often the stream broke and went on."""
        return 0

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._call.cancel()

    async def __anext__(self) -> Delta:
        try:
            return Delta.from_proto(await self._next_response())
        except grpc.RpcError as error:
            raise client_error(error, self._address) from error

    async def _next_response(self) -> pb.GenerateResponse:
        try:
            response: pb.GenerateResponse = await anext(self._responses)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # How gRPC says that the call, not the task that reads it, was cancelled here.
            raise RequestCancelledError(
                "the request was cancelled", grpc.StatusCode.CANCELLED
            ) from error
        return response

    async def __aenter__(self) -> "AsyncDeltaStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncResumingStream(AsyncDeltaStream):
    """The deltas of one request, over as many calls as it takes."""

    def __init__(self, request: ResumableRequest, servers: Sequence[Server]) -> None:
        self._request = request
        self._servers = servers
        self._closed = asyncio.Event()
        call, address = self._call_server()
        super().__init__(call, request.request_id, address)

    @property
    def num_resumes(self) -> int:
        """How often the stream broke and went on."""
        return self._request.num_resumes

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._closed.set()
        super().close()

    async def __anext__(self) -> Delta:
        while True:
            try:
                response = await self._next_response()
            except grpc.RpcError as broken:
                error = client_error(broken, self._address)
                if self._closed.is_set():
                    raise error from broken
                if self._request.is_complete:
                    raise StopAsyncIteration from None
                await self._resume(error)
            else:
                self._request.receive(response)
                return Delta.from_proto(response)

    async def _resume(self, error: NanovllmError) -> None:
        pause_s = self._request.pause_s(error, time.monotonic())
        try:
            async with asyncio.timeout(pause_s):
                await self._closed.wait()
        except TimeoutError:
            self._call, self._address = self._call_server()
            self._responses = aiter(self._call)
        else:
            raise error

    def _call_server(self) -> tuple[Any, str]:
        server = self._request.choose(self._servers)
        remaining_s = self._request.remaining_s(time.monotonic())
        return server.generate(self._request.message(), remaining_s), server.address


class AsyncClient:
    """A connection to one scheduler, for one event loop.

    Methods take the same arguments and raise the same errors as those of `nanovllm.Client`.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float | None = None,
        token: str | None = None,
        tls: TlsConfig | None = None,
        insecure: bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        addresses: Sequence[str] = (),
        resume: bool | ResumePolicy = False,
        share_call: bool = False,
    ) -> None:
        """Prepares a connection; call it where the event loop runs. See `Client`.

        With `share_call` the requests to a server travel in one call of GenerateMany instead of one
        of Generate each. That costs both sides much less where there are many at a time. What a
        slow reader has not read waits in this process then, not in the server.

        Raises:
            ValueError: `address` is neither HOST:PORT nor unix:/path, or the token would cross a
                network in plaintext.
            TlsError: A file that `tls` names cannot be used.
        """
        self.address = check_address(address)
        self._timeout_s = timeout_s
        self._access = Access(token, tls, credentials, insecure)
        self._resume = resume
        self._shared_calls: list[SharedCall] = []
        self._share_call = share_call
        self._channels = [self._access.aio_channel(each) for each in (address, *addresses)]
        self._servers = [
            Server(each, self._generate_at(channel))
            for each, channel in zip((address, *addresses), self._channels, strict=True)
        ]
        self._stub = pb_grpc.InferenceServiceStub(self._channels[0])
        self._health: Any = health_pb2_grpc.HealthStub(self._channels[0])

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
        resume: bool | ResumePolicy | None = None,
    ) -> RequestOutput:
        """Generates and waits for the end; see `Client.generate`."""
        request = generate_request(
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
        )
        folder = OutputFolder(request)
        async with self.start(request, timeout_s=timeout_s, resume=resume) as stream:
            async for delta in stream:
                folder.add(delta)
        return folder.output()

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
        resume: bool | ResumePolicy | None = None,
    ) -> AsyncDeltaStream:
        """Starts a request and returns its deltas; see `Client.generate`."""
        request = generate_request(
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
        )
        return self.start(request, timeout_s=timeout_s, resume=resume)

    def start(
        self,
        request: pb.GenerateRequest,
        *,
        timeout_s: float | None = None,
        resume: bool | ResumePolicy | None = None,
    ) -> AsyncDeltaStream:
        """Starts a request that is built already and returns its deltas."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        policy = resume_policy(self._resume if resume is None else resume)
        if policy is None:
            call = self._servers[0].generate(request, limit_s)
            return AsyncDeltaStream(call, request.request_id, self.address)
        return AsyncResumingStream(
            ResumableRequest(
                request,
                policy,
                deadline_s=None if limit_s is None else time.monotonic() + limit_s,
                num_servers=len(self._servers),
            ),
            self._servers,
        )

    def _generate_at(self, channel: grpc.aio.Channel) -> GenerateCall:
        stub = pb_grpc.InferenceServiceStub(channel)
        if self._share_call:
            shared = SharedCall(lambda: stub.GenerateMany(metadata=self._access.metadata))
            self._shared_calls.append(shared)
            return shared.generate

        def generate(request: pb.GenerateRequest, timeout_s: float | None) -> Any:
            metadata = (*self._access.metadata, *trace_metadata())
            return stub.Generate(request, timeout=timeout_s, metadata=metadata)

        return generate

    async def tokenize(
        self, prompt: Prompt, *, add_special_tokens: bool | None = None
    ) -> list[int]:
        """Returns the token ids that `generate` would use for text or chat messages."""
        request = tokenize_request(prompt, add_special_tokens)
        return list((await self._call(self._stub.Tokenize, request)).token_ids)

    async def detokenize(
        self, token_ids: Iterable[int], *, skip_special_tokens: bool | None = None
    ) -> str:
        """Returns the text of token ids."""
        request = detokenize_request(token_ids, skip_special_tokens)
        text: str = (await self._call(self._stub.Detokenize, request)).text
        return text

    async def abort(self, request_id: str) -> bool:
        """Ends a live request; returns whether there was one of this id."""
        request = pb.AbortRequest(request_id=request_id)
        aborted: bool = (await self._call(self._stub.Abort, request)).aborted
        return aborted

    async def model_info(self) -> ModelInfo:
        """Describes the model that is served."""
        request = pb.GetModelInfoRequest()
        return ModelInfo.from_proto(await self._call(self._stub.GetModelInfo, request))

    async def server_status(self) -> ServerStatus:
        """Describes the server's load and executor."""
        request = pb.GetServerStatusRequest()
        return ServerStatus.from_proto(await self._call(self._stub.GetServerStatus, request))

    async def health(self, service: str = "", *, timeout_s: float = UNARY_TIMEOUT_S) -> Health:
        """Asks the standard health service about one service, or about the server as a whole."""
        request = health_pb2.HealthCheckRequest(service=service)
        return Health.from_proto(await self._call(self._health.Check, request, timeout_s))

    async def close(self) -> None:
        """Closes the connection; live requests are cancelled."""
        for shared in self._shared_calls:
            shared.close()
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout_s: float = UNARY_TIMEOUT_S) -> Any:
        try:
            return await method(request, timeout=timeout_s, metadata=self._access.metadata)
        except grpc.RpcError as error:
            raise client_error(error, self.address) from error
