"""Block accounting: states, sharing, reclaiming, and the invariants under random use."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from scheduler_service.block_manager import (
    BlockAccountingError,
    BlockManager,
    OutOfBlocksError,
    extend_hash,
    root_hash,
)


def chain(tokens: list[int], block_size: int, salt: str = "") -> list[bytes]:
    hashes, parent = [], root_hash(salt)
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = extend_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return hashes


def test_allocation_takes_all_or_nothing():
    blocks = BlockManager(4, 16)
    blocks.allocate(3)
    with pytest.raises(OutOfBlocksError, match="2 blocks wanted, 1 available"):
        blocks.allocate(2)
    assert blocks.num_available == 1


def test_released_registered_blocks_are_found_again():
    blocks = BlockManager(4, 2)
    hashes = chain([1, 2, 3, 4], 2)
    table = blocks.allocate(2)
    for block, block_hash in zip(table, hashes, strict=True):
        blocks.register(block, block_hash)
    blocks.release(table)
    assert (blocks.num_free, blocks.num_cached, blocks.num_owned) == (2, 2, 0)
    assert blocks.match_prefix(chain([1, 2, 3, 4], 2)) == table
    assert blocks.match_prefix(chain([1, 2, 9, 9], 2)) == table[:1]


def test_salts_do_not_share():
    assert not set(chain([1, 2, 3, 4], 2, "a")) & set(chain([1, 2, 3, 4], 2, "b"))


def test_hash_depends_on_everything_before_the_block():
    assert chain([1, 2, 7, 8], 2)[1] != chain([3, 4, 7, 8], 2)[1]


def test_cached_blocks_are_reclaimed_least_recently_used_and_ends_first():
    blocks = BlockManager(4, 1)
    old = blocks.allocate(2)
    for block, block_hash in zip(old, chain([1, 2], 1), strict=True):
        blocks.register(block, block_hash)
    new = blocks.allocate(2)
    for block, block_hash in zip(new, chain([5, 6], 1), strict=True):
        blocks.register(block, block_hash)
    blocks.release(old)
    blocks.release(new)
    assert blocks.allocate(1) == [old[1]]
    assert blocks.match_prefix(chain([1, 2], 1)) == [old[0]]
    blocks.share(blocks.match_prefix(chain([1], 1)))
    assert blocks.allocate(2) == [new[1], new[0]]
    with pytest.raises(OutOfBlocksError):
        blocks.allocate(1)


def test_first_block_of_a_hash_keeps_it():
    blocks = BlockManager(4, 1)
    first, second = blocks.allocate(2)
    (block_hash,) = chain([1], 1)
    blocks.register(first, block_hash)
    blocks.register(second, block_hash)
    blocks.release([second])
    assert blocks.num_free == 3
    assert blocks.match_prefix([block_hash]) == [first]


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda blocks, table: blocks.release(table), "released twice"),
        (lambda blocks, table: blocks.share(table), "is free"),
        (lambda blocks, table: blocks.register(table[0], root_hash("")), "no owner"),
    ],
)
def test_misuse_is_refused(misuse, message):
    blocks = BlockManager(2, 1)
    table = blocks.allocate(1)
    blocks.release(table)
    with pytest.raises(BlockAccountingError, match=message):
        misuse(blocks, table)


def test_a_million_blocks_work():
    blocks = BlockManager(1_000_000, 16)
    table = blocks.allocate(1_000_000)
    assert blocks.num_available == 0
    blocks.release(table)
    assert blocks.num_free == 1_000_000


class BlockManagerMachine(RuleBasedStateMachine):
    """Random owners that share prefixes over a tiny pool."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(6, 2)
        self.owned: list[list[int]] = []

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=2, max_size=8))
    def admit(self, tokens):
        hashes = chain(tokens, 2)
        hits = self.blocks.match_prefix(hashes)
        missing = len(hashes) - len(hits)
        left = self.blocks.num_available - self.blocks.num_reclaimed_by(hits)
        if left < missing:
            return []
        self.blocks.share(hits)
        table = hits + self.blocks.allocate(missing)
        for block, block_hash in zip(table, hashes, strict=True):
            self.blocks.register(block, block_hash)
        self.owned.append(table)
        return table

    @rule(table=consumes(tables))
    def release(self, table):
        if table:
            self.owned.remove(table)
            self.blocks.release(table)

    @rule()
    def drop_cache(self):
        self.blocks.drop_cache()

    @invariant()
    def accounting_holds(self):
        self.blocks.verify(self.owned)


TestBlockManagerMachine = BlockManagerMachine.TestCase
