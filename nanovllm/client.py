"""The synchronous client."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


class DeltaStream(Iterator[Delta]):
    """The deltas of one request, in order.

    Closing it, leaving its `with` block or dropping the last reference to it before the end cancels
    the request on the server. Iterating raises the errors that `Client.generate` lists.
    """

    def __init__(self, call: Any, request_id: str, address: str) -> None:
        self._call = call
        self._address = address
        #: Names the request for `Client.abort`.
        self.request_id = request_id

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._call.cancel()

    def __next__(self) -> Delta:
        with _client_errors(self._address):
            return Delta.from_proto(next(self._call))

    def __enter__(self) -> "DeltaStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class Client:
    """A connection to one scheduler. Threads may share it.

    The connection is made by the first call and made again when it is lost.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """Prepares a connection.

        Args:
            address: HOST:PORT or unix:/path.
            timeout_s: Limit of `generate` and `stream` calls that give none; default: no limit.
            credentials: For TLS; default: an insecure channel.

        Raises:
            ValueError: `address` is neither form.
        """
        self.address = check_address(address)
        self._timeout_s = timeout_s
        options = channel_options(address)
        self._channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self._stub = pb_grpc.InferenceServiceStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout_s: float | None = None,
    ) -> RequestOutput:
        """Generates and waits for the end.

        Args:
            prompt: Text, token ids, chat messages or a `Chat`.
            sampling_params: How tokens are chosen; default: as the model's authors recommend.
            request_id: Names the request; default: random.
            priority: Requests with larger values are served first. In [-1000, 1000].
            cache_salt: Requests share cached prefixes only with requests of the same salt.
            timeout_s: Limit for the whole request; default: the client's.

        Raises:
            TypeError: `prompt` is of no known kind.
            InvalidRequestError: The server refuses a field.
            DuplicateRequestError: A live request has this `request_id`.
            OverloadedError: The queue is full.
            RequestTooLargeError: The request can never fit.
            DeadlineExceededError: `timeout_s` passed.
            RequestCancelledError: The call was cancelled.
            UnavailableError: No server or no executor is there.
            ServerError: The server failed.
        """
        request = generate_request(
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
        )
        folder = OutputFolder(request)
        with self.start(request, timeout_s=timeout_s) as stream:
            for delta in stream:
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
    ) -> DeltaStream:
        """Starts a request and returns its deltas; arguments and errors are those of `generate`."""
        request = generate_request(
            prompt,
            sampling_params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
        )
        return self.start(request, timeout_s=timeout_s)

    def start(self, request: pb.GenerateRequest, *, timeout_s: float | None = None) -> DeltaStream:
        """Starts a request that is built already and returns its deltas."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        call = self._stub.Generate(request, timeout=limit_s)
        return DeltaStream(call, request.request_id, self.address)

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool | None = None) -> list[int]:
        """Returns the token ids that `generate` would use for text or chat messages."""
        request = tokenize_request(prompt, add_special_tokens)
        return list(self._call(self._stub.Tokenize, request).token_ids)

    def detokenize(
        self, token_ids: Iterable[int], *, skip_special_tokens: bool | None = None
    ) -> str:
        """Returns the text of token ids."""
        request = detokenize_request(token_ids, skip_special_tokens)
        text: str = self._call(self._stub.Detokenize, request).text
        return text

    def abort(self, request_id: str) -> bool:
        """Ends a live request; returns whether there was one of this id."""
        aborted: bool = self._call(self._stub.Abort, pb.AbortRequest(request_id=request_id)).aborted
        return aborted

    def model_info(self) -> ModelInfo:
        """Describes the model that is served."""
        return ModelInfo.from_proto(self._call(self._stub.GetModelInfo, pb.GetModelInfoRequest()))

    def server_status(self) -> ServerStatus:
        """Describes the server's load and executor."""
        request = pb.GetServerStatusRequest()
        return ServerStatus.from_proto(self._call(self._stub.GetServerStatus, request))

    def health(self) -> Health:
        """Asks the standard health service."""
        request = health_pb2.HealthCheckRequest()
        return Health.from_proto(self._call(self._health.Check, request))

    def close(self) -> None:
        """Closes the connection; live requests are cancelled."""
        self._channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        with _client_errors(self.address):
            return method(request, timeout=UNARY_TIMEOUT_S)


@contextmanager
def _client_errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise client_error(error, address) from error
