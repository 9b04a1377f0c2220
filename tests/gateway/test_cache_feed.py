"""Numbers, replay and snapshots of prefix cache events; nothing is served here."""

import asyncio
from collections.abc import Callable

from smg_grpc_proto.generated import common_pb2

from scheduler_service.block_manager import BlockHash, StoredBlock, extend_hash, root_hash
from scheduler_service.gateway.cache_feed import MAX_REPLAYED_BATCHES, CacheFeed

LIMIT_S = 10


def blocks(*token_lists: list[int]) -> list[StoredBlock]:
    """A chain of blocks."""
    chain: list[StoredBlock] = []
    block_hash = root_hash("")
    for token_ids in token_lists:
        parent = chain[-1].block_hash if chain else None
        block_hash = extend_hash(block_hash, token_ids)
        chain.append(StoredBlock(block_hash, parent, token_ids, ""))
    return chain


class Index:
    """What a subscriber makes of the events, as the protocol asks it to."""

    def __init__(self) -> None:
        self.last_number: int | None = None
        self.parents: dict[int, int | None] = {}
        self.tokens: dict[int, list[int]] = {}

    def take(self, batch: common_pb2.KvEventBatch) -> None:
        is_resync = batch.HasField("snapshot") and batch.snapshot.index == 0
        if self.last_number is not None and not is_resync:
            assert batch.sequence_number == self.last_number + 1
        self.last_number = batch.sequence_number
        for event in batch.events:
            kind = event.WhichOneof("data")
            if kind == "cleared":
                self.tokens.clear()
                self.parents.clear()
            elif kind == "removed":
                for block_hash in event.removed.block_hashes:
                    del self.tokens[block_hash]
            else:
                stored = event.stored
                has_parent = stored.HasField("parent_block_hash")
                parent = stored.parent_block_hash if has_parent else None
                for block in stored.blocks:
                    assert block.block_size == len(block.token_ids)
                    self.parents[block.block_hash] = parent
                    self.tokens[block.block_hash] = list(block.token_ids)
                    parent = block.block_hash


async def read(feed: CacheFeed, first_number: int, count: int) -> list[common_pb2.KvEventBatch]:
    batches = []
    async with asyncio.timeout(LIMIT_S):
        async for batch in feed.batches(first_number):
            batches.append(batch)
            if len(batches) == count:
                break
    return batches


def run(scenario: Callable[[CacheFeed], object], **options: int) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        result = scenario(CacheFeed(loop.call_soon, start_number=100, **options))
        assert asyncio.iscoroutine(result)
        await result

    asyncio.run(main())


def test_what_happens_in_one_turn_is_one_batch() -> None:
    async def scenario(feed: CacheFeed) -> None:
        chain = blocks([1, 2], [3, 4])
        for block in chain:
            feed.on_stored(block)
        feed.on_removed(chain[1].block_hash)
        (batch,) = await read(feed, 101, 1)
        assert [event.WhichOneof("data") for event in batch.events] == ["stored", "removed"]
        assert [list(block.token_ids) for block in batch.events[0].stored.blocks] == [
            [1, 2],
            [3, 4],
        ]
        assert not batch.events[0].stored.HasField("parent_block_hash")

    run(scenario)


def test_a_block_on_another_branch_begins_an_event_with_its_parent() -> None:
    async def scenario(feed: CacheFeed) -> None:
        first, second = blocks([1, 2], [3, 4])
        _, other = blocks([1, 2], [5, 6])
        for block in (first, second, other):
            feed.on_stored(block)
        (batch,) = await read(feed, 101, 1)
        index = Index()
        index.take(batch)
        assert len(batch.events) == 2
        root = batch.events[0].stored.blocks[0].block_hash
        assert sorted(map(str, index.parents.values())) == sorted(map(str, [None, root, root]))

    run(scenario)


def test_a_subscriber_that_follows_has_the_state_of_the_cache() -> None:
    async def scenario(feed: CacheFeed) -> None:
        index = Index()
        chain = blocks(*[[i, i + 1] for i in range(5)])
        feed.on_stored(chain[0])
        for batch in await read(feed, 0, 1):
            index.take(batch)
        for block in chain[1:]:
            feed.on_stored(block)
            feed.publish()
        feed.on_removed(chain[4].block_hash)
        feed.publish()
        assert index.last_number is not None
        for batch in await read(feed, index.last_number + 1, 5):
            index.take(batch)
        assert list(index.tokens.values()) == [[0, 1], [1, 2], [2, 3], [3, 4]]
        feed.on_cleared()
        for batch in await read(feed, index.last_number + 1, 1):
            index.take(batch)
        assert not index.tokens

    run(scenario)


def test_a_subscriber_that_is_too_far_behind_gets_a_snapshot_and_no_gap() -> None:
    async def scenario(feed: CacheFeed) -> None:
        chain = blocks(*[[i] for i in range(MAX_REPLAYED_BATCHES + 10)])
        for block in chain:
            feed.on_stored(block)
            feed.publish()
        (batch,) = await read(feed, 101, 1)
        assert batch.HasField("snapshot")
        assert batch.sequence_number == feed.last_number
        index = Index()
        index.take(batch)
        assert list(index.tokens.values()) == [block.token_ids for block in chain]
        feed.on_removed(chain[-1].block_hash)
        (next_batch,) = await read(feed, feed.last_number + 1, 1)
        index.take(next_batch)
        assert len(index.tokens) == len(chain) - 1

    run(scenario)


def test_a_number_of_the_future_is_one_of_another_process_and_gets_a_snapshot() -> None:
    async def scenario(feed: CacheFeed) -> None:
        feed.on_stored(blocks([1])[0])
        (batch,) = await read(feed, 5000, 1)
        assert batch.HasField("snapshot")

    run(scenario)


def test_numbers_of_a_later_process_are_larger() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        first = CacheFeed(loop.call_soon)
        await asyncio.sleep(0.005)
        assert CacheFeed(loop.call_soon).last_number > first.last_number > 10**12

    asyncio.run(main())


def test_large_snapshots_and_batches_are_cut_at_consecutive_numbers() -> None:
    async def scenario(feed: CacheFeed) -> None:
        chain = blocks(*[[i, i] for i in range(10)])
        for block in chain:
            feed.on_stored(block)
        live = await read(feed, 101, 4)
        assert [len(b.events[0].stored.blocks) for b in live] == [3, 3, 3, 1]
        chunks = await read(feed, 0, 4)
        assert [c.snapshot.index for c in chunks] == [0, 1, 2, 3]
        assert {c.snapshot.count for c in chunks} == {4}
        assert [c.sequence_number for c in chunks] == [101, 102, 103, 104]
        index = Index()
        for chunk in chunks:
            index.take(chunk)
        assert list(index.tokens.values()) == [block.token_ids for block in chain]

    run(scenario, max_tokens_per_batch=7)


def test_a_snapshot_names_parents_first_even_if_they_are_younger() -> None:
    async def scenario(feed: CacheFeed) -> None:
        first, second = blocks([1], [2])
        feed.on_stored(first)
        feed.on_stored(second)
        feed.on_removed(first.block_hash)
        feed.on_stored(first)
        (batch,) = await read(feed, 0, 1)
        stored = [list(e.stored.blocks[0].token_ids) for e in batch.events if e.HasField("stored")]
        assert stored == [[1], [2]]

    run(scenario)


def test_the_removal_of_an_unknown_block_is_nobodys_business() -> None:
    async def scenario(feed: CacheFeed) -> None:
        feed.on_removed(BlockHash(b"x" * 32))
        feed.publish()
        assert feed.last_number == 100

    run(scenario)
