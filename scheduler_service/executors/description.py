"""One executor at one moment, for whoever asks."""

from dataclasses import dataclass

from nanovllm.v1 import executor_pb2
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

    @property
    def kv_usage_ratio(self) -> float:
        """Share of its KV blocks that sequences own."""
        owned = self.num_kv_blocks - self.num_free_kv_blocks - self.num_cached_kv_blocks
        return owned / self.num_kv_blocks if owned else 0.0
