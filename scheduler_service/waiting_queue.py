"""Order in which sequences are admitted. Pure."""

import heapq
from collections.abc import Iterable, Iterator

from scheduler_service.sequence import Sequence, SequenceId, SequenceStatus


class WaitingQueue:
    """Priority queue with aging.

    A sequence's urgency grows by one priority level per `aging_s` seconds of waiting, so the order
    of two sequences never changes while they wait and one fixed sort key is enough: its arrival,
    moved into the past by `aging_s` per level of priority. Nothing starves, because everything
    that arrives late enough sorts behind.
    """

    def __init__(self, aging_s: float) -> None:
        self._aging_s = aging_s
        self._heap: list[tuple[float, SequenceId, Sequence]] = []
        # Members of the heap that still wait; finished ones are dropped when they surface.
        self._members: set[SequenceId] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for _, seq_id, seq in self._heap if seq_id in self._members)

    def key(self, seq: Sequence) -> tuple[float, SequenceId]:
        """Smaller is more urgent."""
        return (seq.arrival_s - self._aging_s * seq.priority, seq.seq_id)

    def push(self, seq: Sequence) -> None:
        """Adds a waiting sequence; one that waited before returns to its old place."""
        heapq.heappush(self._heap, (*self.key(seq), seq))
        self._members.add(seq.seq_id)

    def push_all(self, seqs: Iterable[Sequence]) -> None:
        """Adds several."""
        for seq in seqs:
            self.push(seq)

    def pop(self) -> Sequence | None:
        """Takes the most urgent sequence, or returns None."""
        while self._heap:
            _, seq_id, seq = heapq.heappop(self._heap)
            if seq_id in self._members:
                self._members.remove(seq_id)
                return seq
        return None

    def discard(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it stands."""
        self._members.discard(seq.seq_id)
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)

    def verify(self) -> None:
        """Raises ValueError unless exactly the waiting sequences are members; for tests."""
        if any(seq.status is not SequenceStatus.WAITING for seq in self):
            raise ValueError("a sequence that does not wait is in the waiting queue")
        if sorted(seq.seq_id for seq in self) != sorted(self._members):
            raise ValueError("members and heap differ")
