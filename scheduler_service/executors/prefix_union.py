"""The prefix caches of several executors as one: a block is there while anybody has it. Pure."""

from scheduler_service.block_manager import BlockHash, PrefixListener, StoredBlock
from scheduler_service.router import ExecutorIndex
from scheduler_service.scheduler import Scheduler


class PrefixUnion:
    """Listens to every scheduler as long as somebody listens to the union."""

    def __init__(self) -> None:
        self._listener: PrefixListener | None = None
        self._schedulers: dict[ExecutorIndex, Scheduler] = {}
        # Blocks that were stored since somebody listens, by who has them.
        self._held: dict[ExecutorIndex, set[BlockHash]] = {}

    def listen(self, listener: PrefixListener | None) -> None:
        """Has `listener` told how the union changes from now on; None: nobody."""
        self._listener = listener
        self._held = {index: set() for index in self._schedulers}
        for index, scheduler in self._schedulers.items():
            scheduler.listen_to_prefixes(self._part(index))

    def add(self, index: ExecutorIndex, scheduler: Scheduler) -> None:
        """A member joined."""
        self._schedulers[index] = scheduler
        self._held[index] = set()
        scheduler.listen_to_prefixes(self._part(index))

    def remove(self, index: ExecutorIndex) -> None:
        """A member left; its cache was cleared before."""
        self._schedulers.pop(index).listen_to_prefixes(None)
        del self._held[index]

    def on_stored(self, index: ExecutorIndex, block: StoredBlock) -> None:
        """A member has a block now."""
        is_new = not self._is_held(block.block_hash)
        self._held[index].add(block.block_hash)
        if is_new and self._listener is not None:
            self._listener.on_stored(block)

    def on_removed(self, index: ExecutorIndex, block_hash: BlockHash) -> None:
        """A member has a block no longer."""
        self._held[index].discard(block_hash)
        if self._listener is not None and not self._is_held(block_hash):
            self._listener.on_removed(block_hash)

    def on_cleared(self, index: ExecutorIndex) -> None:
        """A member's cache is empty."""
        lost, self._held[index] = self._held[index], set()
        if self._listener is None:
            return
        if not any(self._held.values()):
            self._listener.on_cleared()
            return
        for block_hash in lost:
            if not self._is_held(block_hash):
                self._listener.on_removed(block_hash)

    def _is_held(self, block_hash: BlockHash) -> bool:
        return any(block_hash in held for held in self._held.values())

    def _part(self, index: ExecutorIndex) -> "_Part | None":
        return None if self._listener is None else _Part(self, index)


class _Part:
    """The listener of one member."""

    def __init__(self, union: PrefixUnion, index: ExecutorIndex) -> None:
        self._union = union
        self._index = index

    def on_stored(self, block: StoredBlock) -> None:
        self._union.on_stored(self._index, block)

    def on_removed(self, block_hash: BlockHash) -> None:
        self._union.on_removed(self._index, block_hash)

    def on_cleared(self) -> None:
        self._union.on_cleared(self._index)
