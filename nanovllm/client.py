"""The synchronous client."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nanovllm.access import Access
from nanovllm.channel import UNARY_TIMEOUT_S, check_address
from nanovllm.errors import NanovllmError, client_error
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
from nanovllm.tls import TlsConfig
from nanovllm.trace_context import trace_metadata
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

    @property
    def num_resumes(self) -> int:
        """How often the stream broke and went on."""
        return 0

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._call.cancel()

    def __next__(self) -> Delta:
        with _client_errors(self._address):
            return Delta.from_proto(next(self._call))

    def __enter__(self) -> "DeltaStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class ResumingStream(DeltaStream):
    """The deltas of one request, over as many calls as it takes."""

    def __init__(self, request: ResumableRequest, servers: Sequence[Server]) -> None:
        self._request = request
        self._servers = servers
        self._closed = threading.Event()
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

    def __next__(self) -> Delta:
        while True:
            try:
                with _client_errors(self._address):
                    response = next(self._call)
            except NanovllmError as error:
                if self._closed.is_set():
                    raise
                if self._request.is_complete:
                    raise StopIteration from None
                self._resume(error)
            else:
                self._request.receive(response)
                return Delta.from_proto(response)

    def _resume(self, error: NanovllmError) -> None:
        if self._closed.wait(self._request.pause_s(error, time.monotonic())):
            raise error
        self._call, self._address = self._call_server()
        if self._closed.is_set():
            self._call.cancel()

    def _call_server(self) -> tuple[Any, str]:
        server = self._request.choose(self._servers)
        remaining_s = self._request.remaining_s(time.monotonic())
        return server.generate(self._request.message(), remaining_s), server.address


class Client:
    """A connection to one scheduler. Threads may share it.

    The connection is made by the first call and made again when it is lost.
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
    ) -> None:
        """Prepares a connection.

        Args:
            address: HOST:PORT or unix:/path.
            timeout_s: Limit of `generate` and `stream` calls that give none; default: no limit.
            token: Bearer token, for servers that ask for one.
            tls: How the server is trusted and this client proves who it is; default: plaintext.
            insecure: Whether the token may cross a network in plaintext.
            credentials: gRPC's own form of `tls`, instead of it.
            addresses: Further schedulers of the same model, at which requests are resumed.
            resume: Whether requests go on where they are when their stream breaks, at the same
                scheduler or at one of `addresses`; a policy says for how long to try.

        Raises:
            ValueError: `address` is neither form, or the token would cross a network in plaintext.
            TlsError: A file that `tls` names cannot be used.
        """
        self.address = check_address(address)
        self._timeout_s = timeout_s
        self._access = Access(token, tls, credentials, insecure)
        self._resume = resume
        self._channels = [self._access.channel(each) for each in (address, *addresses)]
        self._servers = [
            Server(each, self._generate_at(channel))
            for each, channel in zip((address, *addresses), self._channels, strict=True)
        ]
        self._stub = pb_grpc.InferenceServiceStub(self._channels[0])
        self._health: Any = health_pb2_grpc.HealthStub(self._channels[0])

    def generate(
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
        """Generates and waits for the end.

        Args:
            prompt: Text, token ids, chat messages or a `Chat`.
            sampling_params: How tokens are chosen; default: as the model's authors recommend.
            request_id: Names the request; default: random.
            priority: Requests with larger values are served first. In [-1000, 1000].
            cache_salt: Requests share cached prefixes only with requests of the same salt.
            timeout_s: Limit for the whole request; default: the client's.
            resume: Whether the request goes on when its stream breaks; default: the client's.

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
        with self.start(request, timeout_s=timeout_s, resume=resume) as stream:
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
        resume: bool | ResumePolicy | None = None,
    ) -> DeltaStream:
        """Starts a request and returns its deltas; arguments and errors are those of `generate`."""
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
    ) -> DeltaStream:
        """Starts a request that is built already and returns its deltas."""
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        policy = resume_policy(self._resume if resume is None else resume)
        if policy is None:
            call = self._servers[0].generate(request, limit_s)
            return DeltaStream(call, request.request_id, self.address)
        return ResumingStream(
            ResumableRequest(
                request,
                policy,
                deadline_s=None if limit_s is None else time.monotonic() + limit_s,
                num_servers=len(self._servers),
            ),
            self._servers,
        )

    def _generate_at(self, channel: grpc.Channel) -> GenerateCall:
        stub = pb_grpc.InferenceServiceStub(channel)

        def generate(request: pb.GenerateRequest, timeout_s: float | None) -> Any:
            metadata = (*self._access.metadata, *trace_metadata())
            return stub.Generate(request, timeout=timeout_s, metadata=metadata)

        return generate

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

    def health(self, service: str = "", *, timeout_s: float = UNARY_TIMEOUT_S) -> Health:
        """Asks the standard health service about one service, or about the server as a whole."""
        request = health_pb2.HealthCheckRequest(service=service)
        return Health.from_proto(self._call(self._health.Check, request, timeout_s))

    def close(self) -> None:
        """Closes the connection; live requests are cancelled."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout_s: float = UNARY_TIMEOUT_S) -> Any:
        with _client_errors(self.address):
            return method(request, timeout=timeout_s, metadata=self._access.metadata)


@contextmanager
def _client_errors(address: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise client_error(error, address) from error
