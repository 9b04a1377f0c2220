"""Numbered batches of prefix cache events, for the subscribers that share one cache salt.

A subscriber gets every batch after the one it has last seen, or, where that is not known or too
long ago, a snapshot of all blocks with the number of the batch that it stands for. Numbers begin at
the time of the start, so one of an earlier process is never mistaken for one of this.
"""

import asyncio
import time
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from smg_grpc_proto.generated import common_pb2

from scheduler_service.block_manager import BlockHash, StoredBlock

#: Batches that a subscriber may be behind before it needs a snapshot.
MAX_REPLAYED_BATCHES = 256
# Keeps a message around a megabyte; gateways take four.
_MAX_TOKENS_PER_BATCH = 1 << 18


@dataclass(slots=True)
class _KnownBlock:
    parent: BlockHash | None
    token_ids: "array[int]"


class CacheFeed:
    """Lives on the engine's event loop; `schedule` has `publish` called soon, as `call_soon` does.

    Blocks that were stored before the feed was made are unknown to it: subscribers just do not
    expect hits there.
    """

    def __init__(
        self,
        schedule: Callable[[Callable[[], None]], object],
        start_number: int | None = None,
        max_tokens_per_batch: int = _MAX_TOKENS_PER_BATCH,
    ) -> None:
        self._schedule = schedule
        self._max_tokens = max_tokens_per_batch
        # Milliseconds: far more than the batches of any earlier process.
        self._last_number = time.time_ns() // 1_000_000 if start_number is None else start_number
        self._known: dict[BlockHash, _KnownBlock] = {}
        self._pending: list[common_pb2.KvCacheEvent] = []
        self._num_pending_tokens = 0
        self._last_stored: BlockHash | None = None
        self._replay: deque[common_pb2.KvEventBatch] = deque(maxlen=MAX_REPLAYED_BATCHES)
        self._published = asyncio.Event()

    @property
    def last_number(self) -> int:
        """Number of the newest batch."""
        return self._last_number

    def on_stored(self, block: StoredBlock) -> None:
        """A block can be found."""
        known = _KnownBlock(block.parent, array("i", block.token_ids))
        self._known[block.block_hash] = known
        if self._num_pending_tokens + len(known.token_ids) > self._max_tokens:
            self.publish()
        if not self._pending or block.parent is None or block.parent != self._last_stored:
            self._new_event().stored.CopyFrom(_stored(block.parent))
        self._pending[-1].stored.blocks.append(_block(block.block_hash, known))
        self._last_stored = block.block_hash
        self._num_pending_tokens += len(known.token_ids)

    def on_removed(self, block_hash: BlockHash) -> None:
        """A block cannot be found any more; one that the feed never knew is nobody's business."""
        if self._known.pop(block_hash, None) is None:
            return
        if not self._pending or not self._pending[-1].HasField("removed"):
            self._new_event()
        self._pending[-1].removed.block_hashes.append(_wire_hash(block_hash))
        self._last_stored = None

    def on_cleared(self) -> None:
        """The cache is empty."""
        self._known.clear()
        self._new_event().cleared.SetInParent()
        self._last_stored = None

    def publish(self) -> None:
        """Numbers what has happened since the last time and gives it to the subscribers."""
        if not self._pending:
            return
        self._last_number += 1
        self._replay.append(
            common_pb2.KvEventBatch(
                sequence_number=self._last_number, timestamp=time.time(), events=self._pending
            )
        )
        self._pending = []
        self._num_pending_tokens = 0
        self._last_stored = None
        self._published.set()
        self._published = asyncio.Event()

    async def batches(self, first_number: int) -> AsyncGenerator[common_pb2.KvEventBatch]:
        """Batches from `first_number` on, without an end; 0: from the state of the cache on."""
        next_number = first_number
        while True:
            self.publish()
            published = self._published
            # Nothing awaits between the look at the state and its copy.
            if self._can_replay(next_number):
                skip = next_number - (self._last_number - len(self._replay) + 1)
                batches = list(islice(self._replay, skip, None))
            else:
                batches = list(self._snapshot())
            next_number = self._last_number + 1
            for batch in batches:
                yield batch
            # Unless there was something new while the batches were sent.
            if next_number > self._last_number:
                await published.wait()

    def _can_replay(self, number: int) -> bool:
        return self._last_number - len(self._replay) < number <= self._last_number + 1

    def _new_event(self) -> common_pb2.KvCacheEvent:
        if not self._pending:
            self._schedule(self.publish)
        event = common_pb2.KvCacheEvent()
        self._pending.append(event)
        return event

    def _snapshot(self) -> Iterator[common_pb2.KvEventBatch]:
        """All known blocks; the last chunk has the number of the newest batch."""
        chunks = list(self._chunks())
        for index, events in enumerate(chunks):
            yield common_pb2.KvEventBatch(
                sequence_number=self._last_number - len(chunks) + 1 + index,
                timestamp=time.time(),
                events=events,
                snapshot=common_pb2.KvSnapshotChunk(
                    index=index, count=len(chunks), blocks=len(self._known)
                ),
            )

    def _chunks(self) -> Iterator[list[common_pb2.KvCacheEvent]]:
        events = [common_pb2.KvCacheEvent(cleared=common_pb2.KvCacheCleared())]
        num_tokens = 0
        for block_hash in self._parents_first():
            known = self._known[block_hash]
            if num_tokens and num_tokens + len(known.token_ids) > self._max_tokens:
                yield events
                events, num_tokens = [], 0
            stored = _stored(known.parent)
            stored.blocks.append(_block(block_hash, known))
            events.append(common_pb2.KvCacheEvent(stored=stored))
            num_tokens += len(known.token_ids)
        yield events

    def _parents_first(self) -> Iterable[BlockHash]:
        # A parent that was forgotten and stored again is younger than its children.
        ordered: dict[BlockHash, None] = {}
        for block_hash in self._known:
            chain = []
            link: BlockHash | None = block_hash
            while link is not None and link in self._known and link not in ordered:
                chain.append(link)
                link = self._known[link].parent
            ordered.update(dict.fromkeys(reversed(chain)))
        return ordered


def _stored(parent: BlockHash | None) -> common_pb2.KvBlocksStored:
    return common_pb2.KvBlocksStored(
        parent_block_hash=None if parent is None else _wire_hash(parent)
    )


def _block(block_hash: BlockHash, known: _KnownBlock) -> common_pb2.KvBlock:
    return common_pb2.KvBlock(
        block_hash=_wire_hash(block_hash),
        token_ids=known.token_ids,
        block_size=len(known.token_ids),
    )


def _wire_hash(block_hash: BlockHash) -> int:
    """The protocol's 64-bit hash: the head of ours, which is as good as random."""
    return int.from_bytes(block_hash[:8], "big", signed=True)
