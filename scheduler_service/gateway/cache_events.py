"""Who hears of which blocks: a subscriber learns of those that its own requests could hit.

Events carry the tokens of prompts, so they go to nobody who could not send these prompts' salt.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scheduler_service.block_manager import BlockHash, StoredBlock
from scheduler_service.executors.prefix_union import PrefixUnion
from scheduler_service.gateway.cache_feed import CacheFeed

# How long events go on being kept for subscribers that lost their connection.
_KEPT_FOR_S = 60.0


@dataclass(slots=True)
class _Subscribed:
    feed: CacheFeed
    num_subscribers: int = 0
    expiry: asyncio.TimerHandle | None = None


class CacheEvents:
    """Listens to the prefix caches as long as anybody is interested, and not at all otherwise."""

    def __init__(self, prefixes: PrefixUnion, kept_for_s: float = _KEPT_FOR_S) -> None:
        self._prefixes = prefixes
        self._kept_for_s = kept_for_s
        self._by_salt: dict[str, _Subscribed] = {}

    @contextmanager
    def subscription(self, salt: str) -> Iterator[CacheFeed]:
        """The feed of the blocks with a salt, which listens at least until the block ends."""
        loop = asyncio.get_running_loop()
        entry = self._by_salt.get(salt)
        if entry is None:
            entry = self._by_salt[salt] = _Subscribed(CacheFeed(loop.call_soon))
            if len(self._by_salt) == 1:
                self._prefixes.listen(self)
        if entry.expiry is not None:
            entry.expiry.cancel()
            entry.expiry = None
        entry.num_subscribers += 1
        try:
            yield entry.feed
        finally:
            entry.num_subscribers -= 1
            if entry.num_subscribers == 0:
                entry.expiry = loop.call_later(self._kept_for_s, self._forget, salt)

    def on_stored(self, block: StoredBlock) -> None:
        """A block can be found."""
        entry = self._by_salt.get(block.cache_salt)
        if entry is not None:
            entry.feed.on_stored(block)

    def on_removed(self, block_hash: BlockHash) -> None:
        """A block cannot be found any more."""
        for entry in self._by_salt.values():
            entry.feed.on_removed(block_hash)

    def on_cleared(self) -> None:
        """The cache is empty."""
        for entry in self._by_salt.values():
            entry.feed.on_cleared()

    def _forget(self, salt: str) -> None:
        del self._by_salt[salt]
        if not self._by_salt:
            self._prefixes.listen(None)
