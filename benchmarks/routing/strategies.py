"""Ways to choose an executor, each behind the same method."""

import random
from typing import Protocol

from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.member import Member
from scheduler_service.sequence import Sequence


class Strategy(Protocol):
    """Chooses for one sequence after the other."""

    def send(self, seq: Sequence, fleet: Fleet) -> Member:
        """Queues the sequence at one of the members; returns that."""


class PrefixAware:
    """What the scheduler service does."""

    def send(self, seq: Sequence, fleet: Fleet) -> Member:
        """Leaves the choice to the fleet. Raises RuntimeError if it makes none."""
        fleet.add([seq])
        member = fleet.member_of(seq)
        if member is None:
            raise RuntimeError(f"no executor takes a sequence of {seq.max_total_tokens} tokens")
        return member


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._next = 0

    def send(self, seq: Sequence, fleet: Fleet) -> Member:
        """Takes the next one."""
        member = fleet.members[self._next % len(fleet.members)]
        self._next += 1
        member.scheduler.add(seq)
        return member


class LeastLoaded:
    """The one with the fewest live sequences; of equals, the first."""

    def send(self, seq: Sequence, fleet: Fleet) -> Member:
        """Takes the one with the fewest."""
        member = min(fleet.members, key=lambda each: each.num_live)
        member.scheduler.add(seq)
        return member


class AnyExecutor:
    """All with the same probability."""

    def __init__(self, seed: int) -> None:
        self._generator = random.Random(seed)

    def send(self, seq: Sequence, fleet: Fleet) -> Member:
        """Draws one."""
        member = self._generator.choice(fleet.members)
        member.scheduler.add(seq)
        return member
