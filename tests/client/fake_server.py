"""A scripted InferenceService in this process, for tests of the clients."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc as pb_grpc

EXECUTOR = pb.ExecutorSummary(address="unix:/e", epoch=2**63, device="cpu")


class AbortedError(Exception):
    """A request of a shared call ends with a status."""

    def __init__(self, status: grpc.Status) -> None:
        details = dict(status.trailing_metadata)["grpc-status-details-bin"]
        self.status = status_pb2.Status.FromString(details)


@dataclass
class RequestContext:
    """Stands for the context of a call of its own, for one request of a shared call."""

    call: grpc.ServicerContext
    start: pb.NumberedRequest
    is_cancelled: bool = False
    _code: grpc.StatusCode | None = None
    _callbacks: list[Callable[[], None]] = field(default_factory=list)

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [*self.call.invocation_metadata(), *self.start.metadata.items()]

    def abort_with_status(self, status: grpc.Status) -> None:
        raise AbortedError(status)

    def add_callback(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def is_active(self) -> bool:
        return self.call.is_active() and not self.is_cancelled

    def code(self) -> grpc.StatusCode | None:
        return self._code

    def set_code(self, code: grpc.StatusCode) -> None:
        self._code = code

    def cancel(self) -> None:
        self.is_cancelled = True
        for callback in self._callbacks:
            callback()


@dataclass
class FakeService(pb_grpc.InferenceServiceServicer):
    """Echoes: each completion is the prompt's words, or its token ids, one per delta."""

    #: What was asked, newest last.
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    #: Metadata of the Generate calls, newest last.
    metadata: list[dict[str, str]] = field(default_factory=list)
    #: Errors for the next Generate calls, oldest first.
    errors: list[status_pb2.Status] = field(default_factory=list)
    #: While clear, streams stop after their first delta.
    go_on: threading.Event = field(default_factory=threading.Event)
    #: Set when a stream was cancelled by its client.
    cancelled: threading.Event = field(default_factory=threading.Event)
    #: Leaves out the terminal deltas.
    cut_short: bool = False
    has_chat_template: bool = True
    finish_reason: pb.FinishReason = pb.FINISH_REASON_STOP
    aborted: list[str] = field(default_factory=list)
    most_live: int = 0
    _live: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.go_on.set()

    def Generate(self, request, context) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.errors:
            context.abort_with_status(rpc_status.to_status(self.errors.pop(0)))
        context.add_callback(lambda: None if self.finished(context) else self.cancelled.set())
        with self._lock:
            self._live += 1
            self.most_live = max(self.most_live, self._live)
        try:
            yield from self._completions(request, context)
        finally:
            with self._lock:
                self._live -= 1

    def GenerateMany(  # noqa: N802
        self, requests, context
    ) -> Iterator[pb.GenerateManyResponse]:
        """Each request as by Generate, on a thread of its own."""
        answers: queue.Queue[pb.NumberedResponse] = queue.Queue()
        live: dict[int, RequestContext] = {}
        context.add_callback(lambda: [each.cancel() for each in live.values()])

        def read() -> None:
            # How the sync server says that the call is over.
            with contextlib.suppress(grpc.RpcError):
                for message in requests:
                    for number in message.cancels:
                        live[number].cancel()
                    for start in message.starts:
                        part = live[start.number] = RequestContext(context, start)
                        threading.Thread(target=self._answer, args=(part, answers)).start()

        threading.Thread(target=read, daemon=True).start()
        while context.is_active():
            with contextlib.suppress(queue.Empty):
                yield pb.GenerateManyResponse(responses=[answers.get(timeout=0.05)])

    def _answer(self, context: RequestContext, answers: "queue.Queue[pb.NumberedResponse]") -> None:
        number = context.start.number
        try:
            for response in self.Generate(context.start.request, context):
                answers.put(pb.NumberedResponse(number=number, response=response))
        except AbortedError as error:
            status = error.status
            failure = pb.RequestFailure(
                code=status.code, message=status.message, details=status.details
            )
            answers.put(pb.NumberedResponse(number=number, failure=failure, is_last=True))
        else:
            answers.put(pb.NumberedResponse(number=number, is_last=True))

    @staticmethod
    def finished(context) -> bool:
        return context.code() is not None

    def _completions(self, request, context) -> Iterator[pb.GenerateResponse]:
        words = prompt_words(request)
        num_completions = request.sampling_params.n or 1
        for position, word in enumerate(words):
            for index in range(num_completions):
                yield pb.GenerateResponse(
                    request_id=request.request_id,
                    index=index,
                    text=word if index == 0 else f"{word}{index}",
                    token_ids=[position],
                    logprobs=self._logprobs(request),
                )
            while not self.go_on.wait(0.05):
                if not context.is_active():
                    return
        if self.cut_short:
            return
        for index in range(num_completions):
            yield pb.GenerateResponse(
                request_id=request.request_id,
                index=index,
                finish_reason=self.finish_reason,
                stop_reason=pb.StopReason(token_id=2),
                usage=pb.Usage(
                    prompt_tokens=len(words), completion_tokens=len(words), cached_tokens=1
                ),
            )
        context.set_code(grpc.StatusCode.OK)

    @staticmethod
    def _logprobs(request) -> list[pb.TokenLogprobs]:
        if not request.sampling_params.HasField("logprobs"):
            return []
        return [pb.TokenLogprobs(logprob=-0.5, top_token_ids=[7, 8], top_logprobs=[-0.5, -1.0])]

    def Tokenize(self, request, context):  # noqa: N802
        text = request.text if request.HasField("text") else request.chat.messages[-1].content
        return pb.TokenizeResponse(token_ids=list(text.encode()), max_model_len=64)

    def Detokenize(self, request, context):  # noqa: N802
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    def Abort(self, request, context):  # noqa: N802
        self.aborted.append(request.request_id)
        return pb.AbortResponse(aborted=request.request_id == "live")

    def GetModelInfo(self, request, context):  # noqa: N802
        return pb.GetModelInfoResponse(
            model_name="fake",
            architecture="LlamaForCausalLM",
            max_model_len=64,
            vocab_size=256,
            eos_token_ids=[2],
            default_sampling_params=pb.SamplingParams(temperature=0.5, top_k=20),
            has_chat_template=self.has_chat_template,
            fingerprint="ab" * 32,
        )

    def GetServerStatus(self, request, context):  # noqa: N802
        return pb.GetServerStatusResponse(
            version="1.2.3",
            uptime_s=5.0,
            num_running=1,
            num_waiting=2,
            num_kv_blocks=10,
            num_free_kv_blocks=4,
            num_cached_kv_blocks=3,
            kv_block_size=16,
            executor_state=pb.EXECUTOR_STATE_CONNECTED,
            executor=EXECUTOR,
            executors=[EXECUTOR, pb.ExecutorSummary(address="unix:/f", device="gpu")],
        )


def prompt_words(request: pb.GenerateRequest) -> list[str]:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text.split()
        case "chat":
            return request.chat.messages[-1].content.split()
        case _:
            return [str(token_id) for token_id in request.token_ids.ids]


def error_status(code: int, message: str, *details) -> status_pb2.Status:
    """A status with google.rpc details."""
    status = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def overloaded(retry_after_s: float) -> status_pb2.Status:
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(retry_after_s * 1e9))
    return error_status(
        code_pb2.RESOURCE_EXHAUSTED,
        "the queue is full",
        error_details_pb2.RetryInfo(retry_delay=delay),
    )


@dataclass
class FakeServer:
    """The service behind a real gRPC server on a unix socket or a loopback port."""

    service: FakeService
    address: str
    health: health.HealthServicer
    server: grpc.Server

    @classmethod
    def start(cls, address: str) -> "FakeServer":
        service = FakeService()
        server = grpc.server(ThreadPoolExecutor(max_workers=16))
        pb_grpc.add_InferenceServiceServicer_to_server(service, server)
        health_servicer = health.HealthServicer()
        health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        server.add_insecure_port(address)
        server.start()
        return cls(service, address, health_servicer, server)

    def stop(self) -> None:
        self.service.go_on.set()
        self.server.stop(grace=None).wait()
