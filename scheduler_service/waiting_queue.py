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
        # Entries of the heap that wait here, and those that do not any more, which are dropped when
        # they surface, unless their sequence comes back before.
        self._members: set[SequenceId] = set()
        self._discarded: set[SequenceId] = set()
        # Cost of the members by priority; priorities without any are absent.
        self._num_tokens: dict[int, int] = {}
        #: Prompt tokens of the members.
        self.num_prompt_tokens = 0
        #: Known tokens of the members that are expected to be computed.
        self.num_uncached_tokens = 0

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return (seq for _, seq_id, seq in self._heap if seq_id in self._members)

    def num_tokens(self, min_priority: int | None = None) -> int:
        """Cost of the sequences of this priority and above; None: of all. Aging is left out."""
        if not self._num_tokens:
            return 0  # the usual case, after every plan
        return sum(
            count
            for priority, count in self._num_tokens.items()
            if min_priority is None or priority >= min_priority
        )

    def key(self, seq: Sequence) -> tuple[float, SequenceId]:
        """Smaller is more urgent."""
        return (seq.arrival_s - self._aging_s * seq.priority, seq.seq_id)

    def push(self, seq: Sequence) -> None:
        """Adds a waiting sequence; one that waited before returns to its old place."""
        if seq.seq_id in self._discarded:
            self._discarded.remove(seq.seq_id)
        else:
            heapq.heappush(self._heap, (*self.key(seq), seq))
        self._members.add(seq.seq_id)
        self._num_tokens[seq.priority] = self._num_tokens.get(seq.priority, 0) + seq.cost_tokens
        self.num_prompt_tokens += seq.num_prompt_tokens
        self.num_uncached_tokens += seq.num_uncached_tokens

    def push_all(self, seqs: Iterable[Sequence]) -> None:
        """Adds several."""
        for seq in seqs:
            self.push(seq)

    def pop(self) -> Sequence | None:
        """Takes the most urgent sequence, or returns None."""
        while self._heap:
            _, seq_id, seq = heapq.heappop(self._heap)
            if seq_id in self._members:
                self._remove(seq)
                return seq
            self._discarded.remove(seq_id)
        return None

    def discard(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it stands."""
        if seq.seq_id in self._members:
            self._remove(seq)
            self._discarded.add(seq.seq_id)
        if len(self._discarded) > len(self._members) + 64:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)
            self._discarded.clear()

    def _remove(self, seq: Sequence) -> None:
        self._members.remove(seq.seq_id)
        self.num_prompt_tokens -= seq.num_prompt_tokens
        self.num_uncached_tokens -= seq.num_uncached_tokens
        left = self._num_tokens[seq.priority] - seq.cost_tokens
        if left:
            self._num_tokens[seq.priority] = left
        else:
            del self._num_tokens[seq.priority]

    def verify(self) -> None:
        """Raises ValueError unless exactly the waiting sequences are members; for tests."""
        if any(seq.status is not SequenceStatus.WAITING for seq in self):
            raise ValueError("a sequence that does not wait is in the waiting queue")
        if sorted(seq.seq_id for seq in self) != sorted(self._members):
            raise ValueError("members and heap differ")
        if len(self._heap) != len(self._members) + len(self._discarded):
            raise ValueError("an entry of the heap is neither a member nor discarded")
        if self.num_tokens() != sum(seq.cost_tokens for seq in self):
            raise ValueError("the cost of the members is not their sum")
        if self.num_prompt_tokens != sum(seq.num_prompt_tokens for seq in self):
            raise ValueError("the prompt tokens of the members are not their sum")
        if self.num_uncached_tokens != sum(seq.num_uncached_tokens for seq in self):
            raise ValueError("the uncached tokens of the members are not their sum")
