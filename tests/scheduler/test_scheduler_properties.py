"""Random requests, aborts, delays and restarts: every invariant holds and every text is right."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from scheduler_service.scheduler import ExecutorCapacity, Scheduler, SchedulerPolicy
from scheduler_service.sequence import FinishReason, Sequence
from tests.scheduler.simulated_executor import VOCAB_SIZE, SimulatedExecutor, expected_output

BLOCK_SIZE = 2

# Few distinct tokens, so that prompts meet what others generated.
REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=10),
        "max_tokens": st.integers(1, 16),
        "stop_token_ids": st.sampled_from([(), (), (0,)]),
        "priority": st.integers(-1, 1),
        "salt": st.sampled_from(["", "", "tenant"]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Plans and results are delayed at will; the executor checks every plan and every KV read."""

    @initialize(
        num_blocks=st.integers(4, 24),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(5, 24),
        lookahead=st.integers(0, 12),
        caching=st.booleans(),
    )
    def start(self, num_blocks, max_num_seqs, budget, lookahead, caching):
        self.capacity = ExecutorCapacity(num_blocks, BLOCK_SIZE, max_num_seqs, budget, 64)
        self.scheduler = Scheduler(
            SchedulerPolicy(
                lookahead_tokens=lookahead, enable_prefix_caching=caching, priority_aging_s=5.0
            )
        )
        self.scheduler.attach(self.capacity)
        self.executor = SimulatedExecutor(self.capacity)
        self.now_s = 0.0
        self.seqs: list[Sequence] = []

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4), seconds=st.floats(0.0, 20.0))
    def add(self, requests, seconds):
        self.now_s += seconds
        for request in requests:
            seq = Sequence(
                len(self.seqs),
                request["prompt"],
                max_total_tokens=len(request["prompt"]) + request["max_tokens"],
                stop_token_ids=request["stop_token_ids"],
                priority=request["priority"],
                arrival_s=self.now_s,
                cache_salt=request["salt"],
            )
            if self.scheduler.fits(seq):
                self.seqs.append(seq)
                self.scheduler.add(seq)

    @rule(data=st.data())
    def abort(self, data):
        """Followed by a plan at once, while tokens of the aborted sequence are on their way."""
        live = [seq for seq in self.seqs if not seq.is_finished]
        if live:
            self.scheduler.finish(data.draw(st.sampled_from(live)), FinishReason.ABORT)
            self.plan()

    def plan(self):
        plan = self.scheduler.schedule(self.now_s)
        if plan is not None:
            self.executor.plans.append(plan)

    def deliver(self, count=None):
        for _ in range(len(self.executor.results) if count is None else count):
            if self.executor.results:
                self.scheduler.update(self.executor.results.popleft())

    @rule(turns=st.lists(st.sampled_from(["plan", "iterate", "deliver"]), min_size=4, max_size=24))
    def work(self, turns):
        """Any interleaving: plans pile up, the executor runs ahead, results come late."""
        for turn in turns:
            if turn == "plan":
                self.plan()
            elif turn == "iterate":
                self.executor.run_iteration()
            else:
                self.deliver(1)
            self.scheduler.verify()

    @rule(chance=st.integers(0, 3))
    def lose_executor(self, chance):
        if chance:
            return
        self.scheduler.detach()
        self.scheduler.attach(self.capacity)
        self.executor = SimulatedExecutor(self.capacity)

    @invariant()
    def accounting_holds(self):
        self.scheduler.verify()
        running = [seq for seq in self.seqs if seq.slot is not None]
        assert len(running) == self.scheduler.num_running
        for seq in self.seqs:
            if seq.is_finished:
                assert seq.slot is None
                assert seq.block_table == []

    def teardown(self):
        """Left alone, the machine finishes everything, with the right text and no leak."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(2000):
            if all(seq.is_finished for seq in self.seqs):
                break
            self.plan()
            self.executor.run_iteration()
            self.deliver()
        for seq in self.seqs:
            assert seq.is_finished, "a request is stuck"
            expected = expected_output(
                seq.token_ids[: seq.num_prompt_tokens], seq.max_total_tokens, seq.stop_token_ids
            )
            output = seq.token_ids[seq.num_prompt_tokens :]
            if seq.finish_reason is FinishReason.ABORT:
                assert output == expected[: len(output)]
            else:
                assert output == expected
        self.plan()
        while self.executor.plans:
            self.executor.run_iteration()
        assert self.executor.num_occupied_slots == 0
        assert self.scheduler.blocks.num_owned == 0


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
