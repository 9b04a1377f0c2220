"""Which executor has which sequence: routing, moving, evening out. Pure: no I/O, no clock.

Every live sequence belongs to exactly one scheduler: that of a member, which `Sequence.executor`
names, or the lobby's, where sequences wait while no member takes any. Only sequences that wait are
moved, with all their tokens, so what they generate does not depend on where they run.
"""

import itertools
import sys
from collections import deque
from collections.abc import Iterable
from enum import Enum

from scheduler_service.executors.member import Member
from scheduler_service.executors.prefix_union import PrefixUnion
from scheduler_service.router import Choice, ExecutorIndex, Router, RoutingPolicy
from scheduler_service.scheduler import Scheduler, SchedulerPolicy, SchedulerStats
from scheduler_service.sequence import FinishReason, Sequence


class MoveReason(Enum):
    """Why a sequence was taken from an executor; values of the reason label in metrics."""

    LOST = "lost"
    DRAINED = "drained"
    REMOVED = "removed"
    # Another one had less to do.
    REBALANCED = "rebalanced"


class Fleet:
    """Holds every live sequence. Driven by the pool from one thread."""

    def __init__(self, policy: SchedulerPolicy, routing: RoutingPolicy | None = None) -> None:
        self.policy = policy
        #: In the order in which they joined; replaced as a whole, so that other threads may read.
        self.members: tuple[Member, ...] = ()
        #: Without an executor for good: nothing in it can run.
        self.lobby = Scheduler(policy)
        self.prefixes = PrefixUnion()
        self._router = Router(routing or RoutingPolicy())
        self._indices = map(ExecutorIndex, itertools.count())
        self._by_index: dict[ExecutorIndex, Member] = {}
        #: Sequences that were taken from an executor so far.
        self.num_moved = dict.fromkeys(MoveReason, 0)
        # Of all who left together, then of each member: replaced as a whole, so that no sum that
        # another thread makes meanwhile ever falls.
        self._stats: tuple[SchedulerStats, ...] = (SchedulerStats(),)

    @property
    def stats(self) -> SchedulerStats:
        """The sums over all members, those that left included."""
        return _sum(self._stats)

    @property
    def num_admitted_tokens(self) -> int:
        """`stats.admitted_tokens` alone."""
        count = 0
        for stats in self._stats:
            count += stats.admitted_tokens
        return count

    def schedulers(self) -> tuple[Scheduler, ...]:
        """Everywhere a sequence can be."""
        return (self.lobby, *(member.scheduler for member in self.members))

    def takers(self) -> list[Member]:
        """Members that sequences may be sent to."""
        return [member for member in self.members if member.takes_sequences]

    # Members

    def join(self, address: str) -> Member:
        """Adds a member, which has no session yet."""
        member = Member(next(self._indices), address, Scheduler(self.policy))
        self.members = (*self.members, member)
        self._stats = (*self._stats, member.scheduler.stats)
        self._by_index[member.index] = member
        self.prefixes.add(member.index, member.scheduler)
        return member

    def leave(self, member: Member) -> None:
        """Takes a member without a session out. What waits there goes to the lobby."""
        for seq in member.scheduler.waiting():
            self._move(seq, None, MoveReason.REMOVED)
        self.members = tuple(each for each in self.members if each is not member)
        del self._by_index[member.index]
        self.prefixes.remove(member.index)
        self._router.forget(member.index)
        own = member.scheduler.stats
        others = [each for each in self._stats[1:] if each is not own]
        self._stats = (_sum((self._stats[0], own)), *others)

    def on_lost(self, member: Member) -> list[Sequence]:
        """A member's session is over; returns what ran there and waits again."""
        self._router.forget(member.index)
        return member.scheduler.detach()

    # Sequences

    def fits(self, seq: Sequence) -> bool:
        """Whether a member that takes sequences could run this one; without any, it may be."""
        takers = self.takers()
        return not takers or any(member.fits(seq) for member in takers)

    def add(self, seqs: Iterable[Sequence]) -> None:
        """Queues the new sequences of one request.

        They have one prompt, so they stay together as far as the bound on imbalance allows.
        """
        left = deque(seqs)
        while left:
            seq = left.popleft()
            choice = self._choose(seq)
            if choice is None:
                self._add(seq, None)
                continue
            member = self._by_index[choice.index]
            self._add(seq, member, choice.num_cached_tokens)
            for _ in range(min(len(left), choice.num_followers)):
                self._add(left.popleft(), member, choice.num_follower_cached_tokens)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Ends a sequence wherever it is. Repeating it does nothing."""
        if not seq.is_finished:
            self._home(seq).finish(seq, reason)

    def member_of(self, seq: Sequence) -> Member | None:
        """Where the sequence runs or waits; None: in the lobby."""
        return None if seq.executor is None else self._by_index.get(seq.executor)

    def settle(self, changed: Member | None = None) -> list[Sequence]:
        """Sends what waits where nothing admits it to members that take sequences.

        That is in the lobby, at members without a session, at draining ones, and at `changed`,
        which has another executor than before. What fits nowhere else goes on waiting at a member
        that may still run it. Returns what nobody can run; it is the caller's to end.
        """
        sources = [self.lobby]
        sources += [
            member.scheduler
            for member in self.members
            if member is changed or not member.takes_sequences
        ]
        seqs = [seq for source in sources for seq in source.waiting()]
        has_takers = bool(self.takers())
        hopeless = []
        for seq in sorted(seqs, key=self.lobby.urgency):
            member = self.member_of(seq)
            # Out of the queue, so that it does not count as load there.
            self._home(seq).withdraw(seq)
            choice = self._choose(seq)
            if choice is None:
                is_hopeless = (
                    has_takers if member is None else member.is_connected and not member.fits(seq)
                )
                if is_hopeless:
                    hopeless.append(seq)
                self._add(seq, member)
                continue
            target = self._by_index[choice.index]
            if member is not None and member is not target:
                self.num_moved[_why_not_there(member)] += 1
            self._add(seq, target, choice.num_cached_tokens)
        return hopeless

    def fill(self, member: Member) -> list[Member]:
        """Moves sequences that never ran to a member that has less to do than the others.

        The most urgent ones of whoever is the busiest, until one more would make this member the
        busier one; cached prefixes are given up for an earlier start. Returns who gave some away.
        """
        if not member.takes_sequences:
            return []
        queues = {
            donor: deque(
                seq
                for seq in donor.scheduler.waiting()
                if seq.first_admitted_s is None and member.fits(seq)
            )
            for donor in self.members
            if donor is not member and donor.is_connected and donor.scheduler.num_waiting
        }
        donors: set[Member] = set()
        while queues:
            busiest = max(queues, key=Member.num_live_per_slot)
            if busiest.num_live_per_slot() <= member.num_live_per_slot(1):
                break
            if queues[busiest]:
                self._move(queues[busiest].popleft(), member, MoveReason.REBALANCED)
                donors.add(busiest)
            else:
                del queues[busiest]
        return list(donors)

    def _choose(self, seq: Sequence) -> Choice | None:
        """Where a sequence should go; None: nobody takes it."""
        fitting = [member for member in self.takers() if member.fits(seq)]
        fitting = [member for member in fitting if not member.is_suspect] or fitting
        if not fitting:
            return None
        if len(self.members) == 1:
            return Choice(fitting[0].index, 0, sys.maxsize, 0)
        return self._router.choose([member.candidate(seq) for member in fitting])

    def _home(self, seq: Sequence) -> Scheduler:
        member = self.member_of(seq)
        return self.lobby if member is None else member.scheduler

    def _move(self, seq: Sequence, target: Member | None, reason: MoveReason) -> None:
        self._home(seq).withdraw(seq)
        self.num_moved[reason] += 1
        self._add(seq, target)

    def _add(
        self, seq: Sequence, target: Member | None, num_expected_cached_tokens: int = 0
    ) -> None:
        # Of a resumed request, one completion may be shorter than the prefix of another.
        seq.num_expected_cached_tokens = min(num_expected_cached_tokens, seq.num_tokens)
        if target is not None and target.index != seq.executor:
            target.num_routed += 1
        seq.executor = None if target is None else target.index
        (self.lobby if target is None else target.scheduler).add(seq)

    def verify(self) -> None:
        """Checks all accounting; for tests. Raises BlockAccountingError or ValueError."""
        seen: set[int] = set()
        for member in (None, *self.members):
            scheduler = self.lobby if member is None else member.scheduler
            scheduler.verify()
            index = None if member is None else member.index
            for seq in scheduler.live():
                if seq.executor != index or seq.seq_id in seen:
                    raise ValueError(f"sequence {seq.seq_id} is at {index} and {seq.executor}")
                seen.add(seq.seq_id)


def _sum(counted: Iterable[SchedulerStats]) -> SchedulerStats:
    total = SchedulerStats()
    for stats in counted:
        total.add(stats)
    return total


def _why_not_there(member: Member) -> MoveReason:
    """Why what waits at a member is sent elsewhere."""
    is_drained = member.is_connected and member.is_draining
    return MoveReason.DRAINED if is_drained else MoveReason.LOST
