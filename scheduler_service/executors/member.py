"""One executor as policy sees it. Pure."""

from dataclasses import dataclass

from scheduler_service.router import Candidate, ExecutorIndex
from scheduler_service.scheduler import Scheduler
from scheduler_service.sequence import Sequence


@dataclass(slots=True, eq=False)
class Member:
    """An executor of the fleet with the queue, the batch and the block accounting that it has."""

    # Never used again once the member has left.
    index: ExecutorIndex
    address: str
    scheduler: Scheduler
    # New sequences go elsewhere; those that run go on.
    is_draining: bool = False
    # It owes a sign of life; others are preferred until it gives one or counts as lost.
    is_suspect: bool = False
    # Since it joined: sessions that were opened, and sequences that were sent there.
    num_sessions: int = 0
    num_routed: int = 0

    @property
    def is_connected(self) -> bool:
        """Whether a session is open."""
        return self.scheduler.capacity is not None

    @property
    def takes_sequences(self) -> bool:
        """Whether sequences may be sent there."""
        return self.is_connected and not self.is_draining

    @property
    def num_live(self) -> int:
        """Sequences that run or wait there."""
        return self.scheduler.num_running + self.scheduler.num_waiting

    def num_live_per_slot(self, num_more: int = 0) -> float:
        """How busy a connected member is, or would be with `num_more` sequences."""
        capacity = self.scheduler.capacity
        return (self.num_live + num_more) / capacity.max_num_seqs if capacity else 0.0

    def fits(self, seq: Sequence) -> bool:
        """Whether it could run the sequence to its end."""
        return seq.num_tokens < seq.max_total_tokens and self.scheduler.fits(seq)

    def candidate(self, seq: Sequence) -> Candidate:
        """What the router knows of a connected member. Raises ValueError without a session."""
        blocks, capacity = self.scheduler.blocks, self.scheduler.capacity
        if blocks is None or capacity is None:
            raise ValueError(f"executor {self.address} is not connected")
        hashes = self.scheduler.shareable_hashes(seq, blocks.block_size)
        return Candidate(
            self.index,
            hashes,
            blocks.block_size,
            num_known_blocks=len(blocks.match_prefix(hashes)),
            num_queued_tokens=self.scheduler.num_queued_tokens,
            num_live=self.num_live,
            num_slots=capacity.max_num_seqs,
        )
