"""The prefix caches of several executors as one."""

import random

from scheduler_service.block_manager import BlockHash, StoredBlock
from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.member import Member
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy
from scheduler_service.sequence import FinishReason, Sequence, SequenceId

CAPACITY = ExecutorCapacity(
    num_blocks=10, block_size=2, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64
)


class Index:
    """What a subscriber believes to be cached."""

    def __init__(self) -> None:
        self.hashes: set[BlockHash] = set()
        self.events: list[str] = []

    def on_stored(self, block: StoredBlock) -> None:
        assert block.block_hash not in self.hashes
        assert block.parent is None or block.parent in self.hashes
        self.hashes.add(block.block_hash)
        self.events.append("stored")

    def on_removed(self, block_hash: BlockHash) -> None:
        self.hashes.discard(block_hash)
        self.events.append("removed")

    def on_cleared(self) -> None:
        self.hashes.clear()
        self.events.append("cleared")


class Stage:
    """A fleet whose members compute prompts when told to."""

    def __init__(self, num_members: int = 2) -> None:
        self.fleet = Fleet(SchedulerPolicy())
        self.index = Index()
        self.fleet.prefixes.listen(self.index)
        self._num_seqs = 0
        self.members = [self.join(str(number)) for number in range(num_members)]

    def join(self, address: str) -> Member:
        member = self.fleet.join(address)
        member.scheduler.attach(CAPACITY)
        return member

    def compute(self, member: Member, prompt: list[int]) -> None:
        seq = Sequence(SequenceId(self._num_seqs), prompt, max_total_tokens=len(prompt) + 1)
        self._num_seqs += 1
        member.scheduler.add(seq)
        member.scheduler.schedule(0.0)
        member.scheduler._prefill_plans.clear()
        member.scheduler.finish(seq, FinishReason.ABORT)

    def cached(self) -> set[BlockHash]:
        """What is there, asked of each member."""
        tables = [member.scheduler.blocks._block_of_hash for member in self.fleet.members]
        return {block_hash for table in tables for block_hash in table}


def test_a_block_is_stored_once_and_removed_with_its_last_holder():
    stage = Stage()
    first, second = stage.members
    stage.compute(first, [1, 2, 3, 4])
    assert stage.index.events == ["stored", "stored"]
    stage.compute(second, [1, 2, 3, 4])
    assert stage.index.events == ["stored", "stored"]
    first.scheduler.blocks.drop_cache()
    assert len(stage.index.hashes) == 2
    second.scheduler.blocks.drop_cache()
    assert stage.index.hashes == set()


def test_a_lost_executor_takes_only_what_it_alone_had():
    stage = Stage()
    first, second = stage.members
    stage.compute(first, [1, 2, 3, 4])
    stage.compute(second, [1, 2, 9, 9])
    stage.fleet.on_lost(first)
    assert stage.index.hashes == set(second.scheduler.blocks._block_of_hash)
    stage.fleet.on_lost(second)
    assert stage.index.events[-1] == "cleared"


def test_executors_that_join_and_leave_are_listened_to_meanwhile():
    stage = Stage(1)
    other = stage.join("other")
    stage.compute(other, [5, 6])
    assert len(stage.index.hashes) == 1
    stage.fleet.on_lost(other)
    stage.fleet.leave(other)
    assert stage.index.hashes == set()
    stage.fleet.prefixes.listen(None)
    stage.compute(stage.members[0], [5, 6])
    assert stage.index.hashes == set()


def test_the_union_follows_every_cache_through_evictions_and_losses():
    generator = random.Random(3)
    stage = Stage(3)
    for _ in range(300):
        member = generator.choice(stage.members)
        if generator.random() < 0.05:
            stage.fleet.on_lost(member)
            member.scheduler.attach(CAPACITY)
        stage.compute(member, generator.choices(range(2), k=generator.randint(1, 14)))
        assert stage.index.hashes == stage.cached()
    assert stage.index.events.count("removed") > 50
