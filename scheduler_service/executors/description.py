"""One executor at one moment, for whoever asks."""

from dataclasses import dataclass

from nanovllm.v1 import executor_pb2, inference_pb2
from scheduler_service.executors.connection import Connection


@dataclass(frozen=True, slots=True)
class ExecutorDescription:
    """What is known of an executor and of its work."""

    address: str
    is_connected: bool
    is_draining: bool
    # Why it is not connected, as clients may be told; None while it is.
    problem: str | None
    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_cached_kv_blocks: int
    # What it says of itself: sizes, device, epoch; empty while it is not connected.
    info: executor_pb2.GetExecutorInfoResponse

    @classmethod
    def of(cls, connection: Connection) -> "ExecutorDescription":
        """Reads the state now."""
        member, scheduler = connection.member, connection.member.scheduler
        blocks = scheduler.blocks
        return cls(
            member.address,
            is_connected=member.is_connected,
            is_draining=member.is_draining,
            problem=None if member.is_connected else connection.absence.problem,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_kv_blocks=blocks.num_blocks if blocks else 0,
            num_free_kv_blocks=blocks.num_free if blocks else 0,
            num_cached_kv_blocks=blocks.num_cached if blocks else 0,
            info=connection.info or executor_pb2.GetExecutorInfoResponse(),
        )

    def summary(self) -> inference_pb2.ExecutorSummary:
        """The part that the services tell in the same words."""
        info = self.info
        return inference_pb2.ExecutorSummary(
            address=self.address,
            epoch=info.epoch,
            device=info.device,
            dtype=info.dtype,
            attention_backend=info.attention_backend,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            num_running=self.num_running,
            num_waiting=self.num_waiting,
        )
