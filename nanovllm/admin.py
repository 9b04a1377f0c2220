"""The client of the admin service."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import grpc

from nanovllm.access import Access
from nanovllm.channel import UNARY_TIMEOUT_S, check_address
from nanovllm.errors import NanovllmError, client_error, executor_change_error
from nanovllm.server_info import ExecutorSummary
from nanovllm.tls import TlsConfig
from nanovllm.v1 import admin_pb2 as pb
from nanovllm.v1 import admin_pb2_grpc as pb_grpc

_Translate = Callable[[grpc.RpcError, str], NanovllmError]


class SequenceState(StrEnum):
    """Where a completion stands."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


class LogLevel(StrEnum):
    """Severity of log lines."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LiveSequence:
    """One completion of a live request."""

    index: int
    state: SequenceState
    prompt_tokens: int
    output_tokens: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """A request that is not over yet."""

    request_id: str
    #: "token:NAME", "certificate:NAME", or an address without proof of identity.
    caller: str
    age_s: float
    #: Empty while the prompt is being tokenized.
    sequences: tuple[LiveSequence, ...]


@dataclass(frozen=True, slots=True)
class SchedulerState:
    """What is under way at one moment."""

    requests: tuple[LiveRequest, ...]
    draining: bool


@dataclass(frozen=True, slots=True)
class ExecutorStatus:
    """How an executor is and what it has to do."""

    #: What it says of itself; without a connection its address and number of sequences alone.
    summary: ExecutorSummary
    connected: bool
    #: Whether it gets nothing new.
    draining: bool
    #: Why it is not connected; empty while it is.
    problem: str
    #: KV blocks in all, those with nothing in them, and those with nothing but a cached prefix.
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_cached_kv_blocks: int

    @property
    def kv_usage_ratio(self) -> float:
        """Share of its KV blocks that sequences own."""
        num_unowned = self.num_free_kv_blocks + self.num_cached_kv_blocks
        return 1 - num_unowned / self.num_kv_blocks if self.num_kv_blocks else 0.0


class AdminClient:
    """A connection to a scheduler's admin service. Threads may share it.

    Methods raise NanovllmError, as those of `Client` do.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: TlsConfig | None = None,
        insecure: bool = False,
        timeout_s: float = UNARY_TIMEOUT_S,
    ) -> None:
        """Prepares a connection; the arguments are those of `Client`.

        Raises:
            ValueError: `address` is neither HOST:PORT nor unix:/path, or the token would cross a
                network in plaintext.
            TlsError: A file that `tls` names cannot be used.
        """
        self.address = check_address(address)
        self._timeout_s = timeout_s
        self._access = Access(token, tls, insecure=insecure)
        self._channel = self._access.channel(address)
        self._stub = pb_grpc.AdminServiceStub(self._channel)

    def state(self) -> SchedulerState:
        """Returns the live requests, oldest first."""
        response = self._call(self._stub.GetState, pb.GetStateRequest())
        return SchedulerState(
            tuple(_live_request(item) for item in response.requests), response.draining
        )

    def abort(self, request_id: str, caller: str = "") -> int:
        """Ends live requests, of one caller or of all; returns how many there were."""
        request = pb.AbortRequestsRequest(request_id=request_id, caller=caller)
        num_aborted: int = self._call(self._stub.AbortRequests, request).num_aborted
        return num_aborted

    def drain(self) -> int:
        """Has new requests refused; returns how many are still live."""
        num_live: int = self._call(self._stub.Drain, pb.DrainRequest()).num_live
        return num_live

    def undrain(self) -> None:
        """Has new requests taken again."""
        self._call(self._stub.Undrain, pb.UndrainRequest())

    def flush_prefix_cache(self) -> int:
        """Forgets cached prefixes that no request uses; returns how many KV blocks that freed."""
        request = pb.FlushPrefixCacheRequest()
        num_freed: int = self._call(self._stub.FlushPrefixCache, request).num_freed_kv_blocks
        return num_freed

    def set_log_level(self, level: LogLevel) -> LogLevel:
        """Changes the least severe log lines that are printed; returns the level before."""
        request = pb.SetLogLevelRequest(level=f"LOG_LEVEL_{level.name}")
        previous = self._call(self._stub.SetLogLevel, request).previous_level
        return LogLevel(_name(pb.LogLevel.Name(previous), "LOG_LEVEL_"))

    def executors(self) -> list[ExecutorStatus]:
        """Returns every executor, in the order in which they joined."""
        response = self._call(self._stub.ListExecutors, pb.ListExecutorsRequest())
        return [_executor_status(item) for item in response.executors]

    def add_executor(self, address: str) -> None:
        """Has an executor join, until the scheduler ends; it may take a while to be connected.

        Raises:
            InvalidRequestError: The address is none, or reaches beyond the scheduler's machine
                unprotected.
            ExecutorChangeError: It is an executor's already.
        """
        self._change(self._stub.AddExecutor, pb.AddExecutorRequest(address=address))

    def remove_executor(self, address: str) -> int:
        """Has an executor leave at once; returns how many sequences that interrupts.

        Raises:
            ExecutorChangeError: There is no such executor, or every other one is drained.
        """
        request = pb.RemoveExecutorRequest(address=address)
        num_interrupted: int = self._change(self._stub.RemoveExecutor, request).num_interrupted
        return num_interrupted

    def drain_executor(self, address: str) -> int:
        """Has nothing new sent to an executor; returns how many sequences still run there.

        Raises:
            ExecutorChangeError: There is no such executor.
        """
        request = pb.DrainExecutorRequest(address=address)
        num_running: int = self._change(self._stub.DrainExecutor, request).num_running
        return num_running

    def undrain_executor(self, address: str) -> None:
        """Has requests sent to an executor again.

        Raises:
            ExecutorChangeError: There is no such executor.
        """
        self._change(self._stub.UndrainExecutor, pb.UndrainExecutorRequest(address=address))

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> "AdminClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _change(self, method: Any, request: Any) -> Any:
        return self._call(method, request, executor_change_error)

    def _call(self, method: Any, request: Any, translate: _Translate = client_error) -> Any:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._access.metadata)
        except grpc.RpcError as error:
            raise translate(error, self.address) from error


def _live_request(message: pb.LiveRequest) -> LiveRequest:
    return LiveRequest(
        message.request_id,
        message.caller,
        message.age_s,
        tuple(
            LiveSequence(
                sequence.index,
                SequenceState(_name(pb.SequenceState.Name(sequence.state), "SEQUENCE_STATE_")),
                sequence.prompt_tokens,
                sequence.output_tokens,
                sequence.preemptions,
            )
            for sequence in message.sequences
        ),
    )


def _executor_status(message: pb.ExecutorStatus) -> ExecutorStatus:
    return ExecutorStatus(
        ExecutorSummary.from_proto(message.summary),
        connected=message.connected,
        draining=message.draining,
        problem=message.problem,
        num_kv_blocks=message.num_kv_blocks,
        num_free_kv_blocks=message.num_free_kv_blocks,
        num_cached_kv_blocks=message.num_cached_kv_blocks,
    )


def _name(constant: str, prefix: str) -> str:
    return constant.removeprefix(prefix).lower()
