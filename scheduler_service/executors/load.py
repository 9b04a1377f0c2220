"""What all executors together hold, run and have waiting: read by admission, metrics and gateways.

The metrics server's thread reads while the event loop writes. Every value is one attribute that is
replaced as a whole, and objects that may go away are fetched once.
"""

from collections.abc import Iterable

from scheduler_service.block_manager import BlockManager
from scheduler_service.executors.fleet import Fleet, MoveReason
from scheduler_service.executors.member import Member
from scheduler_service.scheduler import (
    ExecutorCapacity,
    Scheduler,
    SchedulerPolicy,
    SchedulerStats,
)


class FleetLoad:
    """Sums over the members of a fleet and what waits for one."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    @property
    def members(self) -> tuple[Member, ...]:
        """Every executor, connected or not."""
        return self._fleet.members

    @property
    def lobby(self) -> Scheduler:
        """Where sequences wait while no executor takes any."""
        return self._fleet.lobby

    @property
    def num_moved(self) -> dict[MoveReason, int]:
        """Sequences that were taken from an executor so far, by reason."""
        return self._fleet.num_moved

    @property
    def policy(self) -> SchedulerPolicy:
        """The policy of every member."""
        return self._fleet.policy

    @property
    def stats(self) -> SchedulerStats:
        """Counters since the start, as they are now."""
        return self._fleet.stats

    @property
    def num_admitted_tokens(self) -> int:
        """`stats.admitted_tokens`, for who asks after every plan."""
        return self._fleet.num_admitted_tokens

    @property
    def capacities(self) -> list[ExecutorCapacity]:
        """What each connected executor can hold."""
        return _capacities(self._fleet.members)

    @property
    def open_capacities(self) -> list[ExecutorCapacity]:
        """What each executor that takes sequences can hold; of all connected ones if none does."""
        return _capacities(self._fleet.takers() or self._fleet.members)

    @property
    def blocks(self) -> list[BlockManager]:
        """The block accounting of each connected executor."""
        found = [member.scheduler.blocks for member in self._fleet.members]
        return [blocks for blocks in found if blocks is not None]

    @property
    def is_connected(self) -> bool:
        """Whether any executor is."""
        return any(member.is_connected for member in self._fleet.members)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return sum(member.scheduler.num_running for member in self._fleet.members)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return sum(scheduler.num_waiting for scheduler in self._fleet.schedulers())

    def num_waiting_tokens(self, min_priority: int | None = None) -> int:
        """Cost of the sequences without a slot, of this priority and above; None: of all."""
        return sum(each.num_waiting_tokens(min_priority) for each in self._fleet.schedulers())

    @property
    def num_waiting_prompt_tokens(self) -> int:
        """Prompt tokens of the sequences without a slot."""
        return sum(each.num_waiting_prompt_tokens for each in self._fleet.schedulers())

    @property
    def num_running_tokens(self) -> int:
        """Cost of the running sequences."""
        return sum(member.scheduler.num_running_tokens for member in self._fleet.members)

    @property
    def is_full(self) -> bool:
        """Whether a sequence would have been admitted somewhere but for a free slot or blocks."""
        takers = self._fleet.takers()
        return bool(takers) and all(member.scheduler.is_full for member in takers)

    @property
    def max_num_seqs(self) -> int:
        """Slots of all connected executors."""
        return sum(capacity.max_num_seqs for capacity in self.capacities)

    @property
    def kv_usage_ratio(self) -> float:
        """Share of all KV tokens' room that sequences own."""
        blocks = self.blocks
        total = sum(each.num_blocks * each.block_size for each in blocks)
        owned = sum(each.num_owned * each.block_size for each in blocks)
        return owned / total if total else 0.0


def _capacities(members: Iterable[Member]) -> list[ExecutorCapacity]:
    found = (member.scheduler.capacity for member in members)
    return [capacity for capacity in found if capacity is not None]
