"""What a server says about its model, its load and its health."""

from dataclasses import dataclass
from enum import StrEnum

from grpc_health.v1 import health_pb2

from nanovllm.sampling_params import SamplingParams
from nanovllm.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that is served."""

    model_name: str
    architecture: str
    #: Longest sequence (prompt and output), in tokens.
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    #: Values that unset sampling fields take.
    default_sampling_params: SamplingParams
    has_chat_template: bool
    #: SHA-256 (hex) over the files that define the model.
    fingerprint: str

    @classmethod
    def from_proto(cls, message: pb.GetModelInfoResponse) -> "ModelInfo":
        """Returns the value of a message."""
        return cls(
            model_name=message.model_name,
            architecture=message.architecture,
            max_model_len=message.max_model_len,
            vocab_size=message.vocab_size,
            eos_token_ids=tuple(message.eos_token_ids),
            default_sampling_params=SamplingParams.from_proto(message.default_sampling_params),
            has_chat_template=message.has_chat_template,
            fingerprint=message.fingerprint,
        )


@dataclass(frozen=True, slots=True)
class ExecutorSummary:
    """An executor behind a scheduler."""

    address: str
    #: Random number drawn when the executor process started.
    epoch: int
    device: str
    dtype: str
    attention_backend: str
    max_num_seqs: int
    max_num_batched_tokens: int
    #: Sequences that hold KV blocks there, and sequences that wait for some.
    num_running: int = 0
    num_waiting: int = 0

    @classmethod
    def from_proto(cls, message: pb.ExecutorSummary) -> "ExecutorSummary":
        """Returns the value of a message."""
        return cls(
            address=message.address,
            epoch=message.epoch,
            device=message.device,
            dtype=message.dtype,
            attention_backend=message.attention_backend,
            max_num_seqs=message.max_num_seqs,
            max_num_batched_tokens=message.max_num_batched_tokens,
            num_running=message.num_running,
            num_waiting=message.num_waiting,
        )


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """Load and executor state at one moment."""

    version: str
    uptime_s: float
    #: Sequences that hold KV blocks, and sequences that wait for some.
    num_running: int
    num_waiting: int
    #: KV blocks in all, those with nothing in them, and those with nothing but a cached prefix.
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_cached_kv_blocks: int
    #: Tokens per KV block.
    kv_block_size: int
    executor_connected: bool
    #: The first of `executors`; None while no executor is connected.
    executor: ExecutorSummary | None
    #: Every connected executor.
    executors: tuple[ExecutorSummary, ...] = ()

    @classmethod
    def from_proto(cls, message: pb.GetServerStatusResponse) -> "ServerStatus":
        """Returns the value of a message."""
        executor = None
        if message.HasField("executor"):
            executor = ExecutorSummary.from_proto(message.executor)
        return cls(
            version=message.version,
            uptime_s=message.uptime_s,
            num_running=message.num_running,
            num_waiting=message.num_waiting,
            num_kv_blocks=message.num_kv_blocks,
            num_free_kv_blocks=message.num_free_kv_blocks,
            num_cached_kv_blocks=message.num_cached_kv_blocks,
            kv_block_size=message.kv_block_size,
            executor_connected=message.executor_state == pb.EXECUTOR_STATE_CONNECTED,
            executor=executor,
            executors=tuple(map(ExecutorSummary.from_proto, message.executors)),
        )


class Health(StrEnum):
    """The answer of the standard health service."""

    #: The server takes requests and its executor makes progress.
    SERVING = "serving"
    #: No executor is connected, or the server is shutting down.
    NOT_SERVING = "not serving"
    #: The server does not say.
    UNKNOWN = "unknown"

    @classmethod
    def from_proto(cls, message: health_pb2.HealthCheckResponse) -> "Health":
        """Returns the value of a message."""
        match message.status:
            case health_pb2.HealthCheckResponse.SERVING:
                return cls.SERVING
            case health_pb2.HealthCheckResponse.NOT_SERVING:
                return cls.NOT_SERVING
            case _:
                return cls.UNKNOWN
