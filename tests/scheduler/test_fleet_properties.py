"""Random arrivals, losses, joins, leaves and drains over up to four executors of different sizes.

Every sequence is at one executor at a time and ends with the text of its prompt, whoever made it.
"""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.member import Member
from scheduler_service.router import RoutingPolicy
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy
from scheduler_service.sequence import FinishReason, Sequence, SequenceId
from tests.scheduler.simulated_executor import VOCAB_SIZE, SimulatedExecutor, expected_output

MAX_EXECUTORS = 4
MAX_IMBALANCE = 2
# Every executor can hold the longest request, but for the small ones.
LARGE_TOKENS = 26

REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=10),
        "max_tokens": st.integers(1, 16),
        "stop_token_ids": st.sampled_from([(), (), (0,)]),
        "priority": st.integers(-1, 1),
        "n": st.integers(1, 3),
    }
)
LARGE = st.builds(
    ExecutorCapacity,
    num_blocks=st.integers(7, 16),
    block_size=st.sampled_from([4, 8]),
    max_num_seqs=st.integers(1, 4),
    max_num_batched_tokens=st.integers(5, 24),
    max_model_len=st.just(64),
)
SMALL = st.builds(
    ExecutorCapacity,
    num_blocks=st.integers(3, 6),
    block_size=st.just(2),
    max_num_seqs=st.integers(1, 2),
    max_num_batched_tokens=st.integers(5, 8),
    max_model_len=st.integers(8, 64),
)
CAPACITIES = LARGE | LARGE | SMALL


class FleetMachine(RuleBasedStateMachine):
    """Does what the pool and the engine do, in any order and as late as it likes."""

    @initialize(capacity=LARGE, caching=st.booleans(), lookahead=st.integers(0, 12))
    def start(self, capacity, caching, lookahead):
        policy = SchedulerPolicy(
            lookahead_tokens=lookahead, enable_prefix_caching=caching, priority_aging_s=5.0
        )
        self.fleet = Fleet(policy, RoutingPolicy(max_imbalance=MAX_IMBALANCE))
        self.executors: dict[Member, SimulatedExecutor] = {}
        self.seqs: list[Sequence] = []
        self.now_s = 0.0
        self.connect(self.fleet.join("first"), capacity)

    def member(self, data) -> Member:
        return data.draw(st.sampled_from(self.fleet.members))

    def connect(self, member, capacity):
        member.scheduler.attach(capacity)
        self.executors[member] = SimulatedExecutor(capacity)
        self.settle(member)
        before = [(each, each.num_live) for each in self.fleet.members]
        waiting = {seq.seq_id for seq in member.scheduler.waiting()}
        donors = self.fleet.fill(member)
        for seq in member.scheduler.waiting():
            assert seq.seq_id in waiting or seq.first_admitted_s is None
        # Nobody who gave something away has less to do now than the one that got it.
        for each, num_live in before:
            if each is not member:
                assert (each.num_live < num_live) == (each in donors)
                if each in donors:
                    assert each.num_live_per_slot(1) > member.num_live_per_slot()

    def disconnect(self, member):
        ran = self.fleet.on_lost(member)
        assert all(seq.slot is None for seq in ran)
        del self.executors[member]

    def settle(self, changed=None):
        for seq in self.fleet.settle(changed):
            assert not any(member.fits(seq) for member in self.fleet.takers())
            self.fleet.finish(seq, FinishReason.ERROR)
        # Nothing waits where it will not be admitted while another could run it.
        for member in self.fleet.members:
            if not member.is_connected:
                for seq in member.scheduler.waiting():
                    assert not any(each.fits(seq) for each in self.fleet.takers())

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4), seconds=st.floats(0.0, 20.0))
    def add(self, requests, seconds):
        self.now_s += seconds
        for request in requests:
            seqs = [
                Sequence(
                    SequenceId(len(self.seqs) + index),
                    request["prompt"],
                    max_total_tokens=len(request["prompt"]) + request["max_tokens"],
                    stop_token_ids=request["stop_token_ids"],
                    priority=request["priority"],
                    arrival_s=self.now_s,
                )
                for index in range(request["n"])
            ]
            if not self.fleet.fits(seqs[0]):
                continue
            self.seqs += seqs
            self.fleet.add(seqs)
            self.check_balance(seqs)

    def check_balance(self, seqs):
        """The last of a request that went to a member went there within the bound."""
        fitting = [member for member in self.fleet.takers() if member.fits(seqs[0])]
        trusted = [member for member in fitting if not member.is_suspect] or fitting
        if not trusted:
            assert all(seq.executor is None for seq in seqs)
            return
        slots = {member: member.scheduler.capacity.max_num_seqs for member in trusted}
        most = max(slots.values())
        fewest = min(member.num_live * most / slots[member] for member in trusted)
        chosen = {self.fleet.member_of(seq) for seq in seqs}
        assert chosen <= set(trusted)
        for member in chosen:
            load_before_it = (member.num_live - 1) * most / slots[member]
            assert load_before_it <= fewest + MAX_IMBALANCE

    @rule(data=st.data())
    def abort(self, data):
        live = [seq for seq in self.seqs if not seq.is_finished]
        if live:
            self.fleet.finish(data.draw(st.sampled_from(live)), FinishReason.ABORT)

    @rule(data=st.data(), capacity=CAPACITIES)
    def join(self, data, capacity):
        if len(self.fleet.members) < MAX_EXECUTORS:
            member = self.fleet.join(f"executor {len(self.fleet.members)}")
            if data.draw(st.booleans()):
                self.connect(member, capacity)

    @rule(data=st.data())
    def leave(self, data):
        if len(self.fleet.members) > 1:
            member = self.member(data)
            if member.is_connected:
                self.disconnect(member)
            self.fleet.leave(member)
            self.settle()

    @rule(data=st.data())
    def lose(self, data):
        member = self.member(data)
        if member.is_connected:
            self.disconnect(member)
            self.settle()

    @rule(data=st.data(), capacity=CAPACITIES)
    def come_back(self, data, capacity):
        member = self.member(data)
        if not member.is_connected:
            self.connect(member, capacity)

    @rule(data=st.data(), is_draining=st.booleans())
    def drain(self, data, is_draining):
        self.member(data).is_draining = is_draining
        self.settle()

    @rule(data=st.data(), is_suspect=st.booleans())
    def suspect(self, data, is_suspect):
        self.member(data).is_suspect = is_suspect

    @rule(
        data=st.data(),
        turns=st.lists(st.sampled_from(["plan", "iterate", "deliver"]), min_size=4, max_size=24),
    )
    def work(self, data, turns):
        for turn in turns:
            if self.executors:
                self.turn(data.draw(st.sampled_from(list(self.executors))), turn)

    def turn(self, member, turn):
        executor = self.executors[member]
        if turn == "plan":
            plan = member.scheduler.schedule(self.now_s)
            if plan is not None:
                executor.plans.append(plan)
        elif turn == "iterate":
            executor.run_iteration()
        elif executor.results:
            member.scheduler.update(executor.results.popleft())

    @invariant()
    def every_live_sequence_is_at_one_place(self):
        self.fleet.verify()
        held = [seq for scheduler in self.fleet.schedulers() for seq in scheduler.live()]
        live = [seq for seq in self.seqs if not seq.is_finished]
        assert sorted(seq.seq_id for seq in held) == [seq.seq_id for seq in live]
        for seq in self.seqs:
            if seq.is_finished:
                assert seq.slot is None
                assert seq.block_table == []

    def teardown(self):
        """Once a large executor takes sequences, everything ends, with the right text."""
        if not hasattr(self, "fleet"):
            return
        capacity = ExecutorCapacity(LARGE_TOKENS, 4, 4, 16, 64)
        self.connect(self.fleet.join("last"), capacity)
        for _ in range(2000):
            if all(seq.is_finished for seq in self.seqs):
                break
            for member in list(self.executors):
                for turn in ("plan", "iterate", "deliver"):
                    self.turn(member, turn)
        for seq in self.seqs:
            self.check_text(seq)
        for member, executor in self.executors.items():
            self.turn(member, "plan")
            while executor.plans:
                executor.run_iteration()
            assert executor.num_occupied_slots == 0
            assert member.scheduler.blocks.num_owned == 0

    def check_text(self, seq):
        assert seq.is_finished, "a sequence is stuck"
        expected = expected_output(
            seq.token_ids[: seq.num_prompt_tokens], seq.max_total_tokens, seq.stop_token_ids
        )
        output = seq.token_ids[seq.num_prompt_tokens :]
        if seq.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert output == expected
        else:
            assert output == expected[: len(output)]


TestFleetMachine = FleetMachine.TestCase
TestFleetMachine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
