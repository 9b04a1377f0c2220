"""Accounting of the executor's KV blocks, with a prefix cache. Pure: no I/O, no clock.

A block is in exactly one of three states:

    free      holds nothing of value
    cached    nobody owns it, but it holds a known prefix; reclaimed least recently used first
    owned     one or more sequences refer to it

Every operation costs O(1) per block.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NewType, Protocol

BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than are free or reclaimable."""


class BlockAccountingError(RuntimeError):
    """A caller broke an ownership rule; the scheduler has a bug."""


def root_hash(salt: str) -> BlockHash:
    """Start of a hash chain. Different salts never share blocks."""
    return BlockHash(hashlib.sha256(b"nanovllm prefix\0" + salt.encode()).digest())


def extend_hash(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """Hash of a full block: SHA-256 over the hash of everything before it and its own tokens."""
    return BlockHash(hashlib.sha256(parent + array("i", token_ids).tobytes()).digest())


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A full block that others can share from now on."""

    block_hash: BlockHash
    # None: it is the first block of its prefix.
    parent: BlockHash | None
    token_ids: list[int]
    cache_salt: str


class PrefixListener(Protocol):
    """Who is told how the prefix cache changes, in order. It must neither block nor call back."""

    def on_stored(self, block: StoredBlock) -> None:
        """A block can be found."""

    def on_removed(self, block_hash: BlockHash) -> None:
        """A block cannot be found any more."""

    def on_cleared(self) -> None:
        """The cache is empty: it is another one, or there is none."""


class BlockManager:
    """Owns the mapping from blocks to references and from prefix hashes to blocks."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token: {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        #: Told of removals here, of the rest by who knows the tokens; None: nobody listens.
        self.listener: PrefixListener | None = None
        self._ref_counts = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        # Popped from the end, so that low ids go first.
        self._free = [BlockId(i) for i in range(num_blocks - 1, -1, -1)]
        # Least recently used first. Holds exactly the blocks with a hash and no references.
        self._cached: OrderedDict[BlockId, None] = OrderedDict()
        self._block_of_hash: dict[BlockHash, BlockId] = {}

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing of value."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks without an owner that hold a known prefix."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out."""
        return len(self._free) + len(self._cached)

    @property
    def num_owned(self) -> int:
        """Blocks that at least one sequence refers to."""
        return self.num_blocks - self.num_available

    def blocks_for(self, num_tokens: int) -> int:
        """Number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match_prefix(self, hashes: Iterable[BlockHash]) -> list[BlockId]:
        """Returns the blocks of the longest known prefix of the chain, without taking them."""
        blocks = []
        for block_hash in hashes:
            block = self._block_of_hash.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_reclaimed_by(self, blocks: Iterable[BlockId]) -> int:
        """How many of `blocks` would leave the available ones if they were shared."""
        return sum(1 for block in blocks if self._ref_counts[block] == 0)

    def share(self, blocks: Iterable[BlockId]) -> None:
        """Adds a reference to blocks that `match_prefix` found."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                if block not in self._cached:
                    raise BlockAccountingError(f"block {block} is free and cannot be shared")
                del self._cached[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[BlockId]:
        """Takes `count` blocks with one reference each, reclaiming cached ones if it must.

        Raises OutOfBlocksError, and takes nothing, if there are too few.
        """
        if count > self.num_available:
            raise OutOfBlocksError(f"{count} blocks wanted, {self.num_available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def register(self, block: BlockId, block_hash: BlockHash) -> bool:
        """Makes an owned, full block findable. The first block of a hash keeps it.

        Returns whether the hash is new.
        """
        if self._ref_counts[block] == 0:
            raise BlockAccountingError(f"block {block} has no owner and cannot be registered")
        if self._hashes[block] is not None or block_hash in self._block_of_hash:
            return False
        self._hashes[block] = block_hash
        self._block_of_hash[block_hash] = block
        return True

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Drops one reference of each block of a sequence, given in sequence order.

        The end of a sequence is reclaimed before its beginning, which others more likely share.
        """
        for block in reversed(blocks):
            if self._ref_counts[block] == 0:
                raise BlockAccountingError(f"block {block} was released twice")
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def drop_cache(self) -> int:
        """Forgets every prefix that nobody owns; returns how many blocks became free."""
        dropped = len(self._cached)
        for block in islice(self._cached, dropped):
            self._forget(block)
            self._free.append(block)
        self._cached.clear()
        return dropped

    def verify(self, owners: Iterable[Sequence[BlockId]]) -> None:
        """Checks every invariant against the block tables of all owners; for tests and debugging.

        Raises BlockAccountingError. Costs O(num_blocks).
        """
        expected = [0] * self.num_blocks
        for table in owners:
            for block in table:
                expected[block] += 1
        if expected != self._ref_counts:
            raise BlockAccountingError("reference counts differ from the block tables")
        unowned = {block for block, count in enumerate(expected) if count == 0}
        if len(self._free) + len(self._cached) != len(unowned) or unowned != {
            *self._free,
            *self._cached,
        }:
            raise BlockAccountingError("free + cached + owned blocks are not all blocks")
        for block_hash, block in self._block_of_hash.items():
            if self._hashes[block] != block_hash:
                raise BlockAccountingError(f"block {block} is known by a hash of another")
        if any(self._hashes[block] is not None for block in self._free):
            raise BlockAccountingError("a free block still has a hash")
        if any(self._hashes[block] is None for block in self._cached):
            raise BlockAccountingError("a cached block has no hash")

    def _forget(self, block: BlockId) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            self._hashes[block] = None
            del self._block_of_hash[block_hash]
            if self.listener is not None:
                self.listener.on_removed(block_hash)
