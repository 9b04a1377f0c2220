"""Which of several executors a request goes to. Pure: no I/O, no clock.

A request costs the least where most of its prompt is cached, unless that executor is busier than
the others. What is weighed are tokens to compute: those that the request waits for, and those that
it makes others wait for.

    cost = queued there + 2 x (tokens of the request - tokens of its prefix known there)

Its own tokens count twice, for it waits for them itself and so does whoever comes behind it. If
they counted once, a prefix in somebody's queue would be worth no more than computing it again
elsewhere. The choice is among the executors whose load exceeds the least by at most
`max_imbalance`. (Costs of prefill work as in Preble, https://arxiv.org/abs/2407.00023; a bound on
load beside affinity as in consistent hashing with bounded loads, https://arxiv.org/abs/1608.01350.)
"""

import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NewType

from scheduler_service.block_manager import BlockHash

ExecutorIndex = NewType("ExecutorIndex", int)


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """Bounds of the choice."""

    # Most live sequences that the chosen executor may have beyond the least loaded one, if that is
    # less than a full batch. Where executors differ in slots, it holds for the one with the most,
    # and for the others in proportion. Half as many make bursts of one prefix compute it again and
    # again, twice as many make the requests of a hot prefix wait for no gain.
    max_imbalance: int = 32


@dataclass(frozen=True, slots=True)
class Candidate:
    """An executor that could take a request, as the request sees it."""

    index: ExecutorIndex
    # Hash chain of the request's full blocks, in the executor's block size.
    hashes: Sequence[BlockHash]
    block_size: int
    # Leading blocks of that chain whose KV is there, or in a plan that was sent.
    num_known_blocks: int
    # Tokens of others that are yet to be computed there, without those expected to be cached.
    num_queued_tokens: int
    # Sequences that run or wait there.
    num_live: int
    # Sequences that can run at once.
    num_slots: int


@dataclass(frozen=True, slots=True)
class Choice:
    """Where a request goes."""

    index: ExecutorIndex
    # Leading tokens whose KV should be there by the time it is admitted.
    num_cached_tokens: int
    # Further sequences of its prompt that the bound on imbalance lets follow it at once, and what
    # of their prompt should be cached by then: it is computed for the first.
    num_followers: int
    num_follower_cached_tokens: int


class Router:
    """Chooses executors and remembers where prefixes are about to be computed.

    Requests of the same prefix often arrive together, before the first of them was admitted
    anywhere. Without the memory they would be spread over all executors, each of which would then
    compute the prefix.
    """

    def __init__(self, policy: RoutingPolicy) -> None:
        self._policy = policy
        # Hashes of blocks that were sent to an executor's queue, oldest first.
        self._expected: dict[ExecutorIndex, OrderedDict[BlockHash, None]] = {}

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        """Returns the executor for a request. Raises ValueError without candidates."""
        if not candidates:
            raise ValueError("there is no executor to choose from")
        most_slots = max(candidate.num_slots for candidate in candidates)
        loads = [each.num_live * most_slots / each.num_slots for each in candidates]
        allowed = min(loads) + self._bound(most_slots)
        best: tuple[int, float, ExecutorIndex] | None = None
        for candidate, load in zip(candidates, loads, strict=True):
            if load > allowed:
                continue
            num_blocks = self._num_expected_blocks(candidate)
            # The request's own tokens are the same for all.
            cost = candidate.num_queued_tokens - 2 * num_blocks * candidate.block_size
            key = (cost, load, candidate.index)
            if best is None or key < best:
                best, chosen, num_cached_blocks = key, candidate, num_blocks
        self._remember(chosen, num_cached_blocks)
        return Choice(
            chosen.index,
            num_cached_tokens=num_cached_blocks * chosen.block_size,
            num_followers=self._num_followers(chosen, candidates, loads),
            num_follower_cached_tokens=len(chosen.hashes) * chosen.block_size,
        )

    def forget(self, index: ExecutorIndex) -> None:
        """The executor lost its cache and its queue."""
        self._expected.pop(index, None)

    def _num_expected_blocks(self, candidate: Candidate) -> int:
        """Leading blocks that are there, or will be when the queue has been worked off."""
        num_blocks = candidate.num_known_blocks
        expected = self._expected.get(candidate.index)
        if not expected:
            return num_blocks
        # Queues are worked off from the front: what is older than the tokens that are still queued
        # has been computed. If it is not known by now, it was evicted or given up.
        for _ in range(len(expected) - candidate.num_queued_tokens // candidate.block_size):
            expected.popitem(last=False)
        for block_hash in islice(candidate.hashes, num_blocks, None):
            if block_hash not in expected:
                break
            num_blocks += 1
        return num_blocks

    def _remember(self, candidate: Candidate, num_expected_blocks: int) -> None:
        expected = self._expected.setdefault(candidate.index, OrderedDict())
        for block_hash in islice(candidate.hashes, num_expected_blocks, None):
            expected[block_hash] = None

    def _num_followers(
        self, chosen: Candidate, candidates: Sequence[Candidate], loads: Sequence[float]
    ) -> int:
        fewest = min(
            (load for each, load in zip(candidates, loads, strict=True) if each is not chosen),
            default=None,
        )
        if fewest is None:
            return sys.maxsize
        most_slots = max(candidate.num_slots for candidate in candidates)
        allowed = (fewest + self._bound(most_slots)) * chosen.num_slots / most_slots
        return max(0, int(allowed) - chosen.num_live)

    def _bound(self, most_slots: int) -> int:
        # Beyond a batch, all that a prefix saves is less than the wait for a slot.
        return min(self._policy.max_imbalance, most_slots)
