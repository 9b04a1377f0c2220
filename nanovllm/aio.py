"""The asyncio client."""

from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanovllm.channel import UNARY_TIMEOUT_S, channel_options, check_address
from nanovllm.errors import client_error
from nanovllm.outputs import Delta, OutputFolder, RequestOutput
from nanovllm.requests import Prompt, detokenize_request, generate_request, tokenize_request
from nanovllm.sampling_params import SamplingParams
from nanovllm.server_info import Health, ModelInfo, ServerStatus
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

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._call.cancel()

    async def __anext__(self) -> Delta:
        try:
            return Delta.from_proto(await anext(self._responses))
        except grpc.RpcError as error:
            raise client_error(error, self._address) from error

    async def __aenter__(self) -> "AsyncDeltaStream":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class AsyncClient:
    """A connection to one scheduler, for one event loop.

    Methods take the same arguments and raise the same errors as those of `nanovllm.Client`.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Prepares a connection; call it where the event loop runs. See `Client`.

        Raises:
            ValueError: `address` is neither HOST:PORT nor unix:/path.
        """
        self.address = check_address(address)
        self._timeout_s = timeout_s
        options = channel_options(address)
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self._stub = pb_grpc.InferenceServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
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
        async with self.start(request, timeout_s=timeout_s) as stream:
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
    ) -> AsyncDeltaStream:
        """Starts a request and returns its deltas; see `Client.generate`."""
        request = generate_request(
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
        )
        return self.start(request, timeout_s=timeout_s)

    def start(
        self, request: pb.GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncDeltaStream:
        """Starts a request that is built already and returns its deltas."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        call = self._stub.Generate(request, timeout=limit_s)
        return AsyncDeltaStream(call, request.request_id, self.address)

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

    async def health(self) -> Health:
        """Asks the standard health service."""
        request = health_pb2.HealthCheckRequest()
        return Health.from_proto(await self._call(self._health.Check, request))

    async def close(self) -> None:
        """Closes the connection; live requests are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, timeout=UNARY_TIMEOUT_S)
        except grpc.RpcError as error:
            raise client_error(error, self.address) from error
