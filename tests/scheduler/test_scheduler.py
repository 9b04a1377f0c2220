"""The policy, one claim at a time."""

import pytest

from scheduler_service.plan import StepResult
from scheduler_service.scheduler import (
    ExecutorCapacity,
    ExecutorProtocolError,
    Scheduler,
    SchedulerPolicy,
)
from scheduler_service.sequence import (
    FinishReason,
    Sequence,
    SequenceStateError,
    SequenceStatus,
    SlotSampling,
)
from tests.scheduler.simulated_executor import SimulatedExecutor, expected_output

CAPACITY = ExecutorCapacity(
    num_blocks=64, block_size=4, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=128
)


class Harness:
    """A scheduler and a simulated executor, stepped by hand."""

    def __init__(self, capacity: ExecutorCapacity = CAPACITY, **policy) -> None:
        self.scheduler = Scheduler(SchedulerPolicy(**policy))
        self.scheduler.attach(capacity)
        self.executor = SimulatedExecutor(capacity)
        self.now_s = 0.0
        self.count = 0
        self.iteration_tokens: list[int] = []

    def add(self, prompt: list[int], max_tokens: int = 4, **options) -> Sequence:
        options.setdefault("arrival_s", self.now_s)
        seq = Sequence(self.count, prompt, max_total_tokens=len(prompt) + max_tokens, **options)
        self.count += 1
        self.scheduler.add(seq)
        return seq

    def plan(self):
        plan = self.scheduler.schedule(self.now_s)
        if plan is not None:
            self.executor.plans.append(plan)
        self.scheduler.verify()
        return plan

    def step(self):
        plan = self.plan()
        self.executor.run_iteration()
        while self.executor.results:
            _, num_tokens = self.scheduler.update(self.executor.results.popleft())
            self.iteration_tokens.append(num_tokens)
        self.scheduler.verify()
        return plan

    def run(self, limit: int = 500) -> None:
        for _ in range(limit):
            if not self.scheduler.num_waiting and not self.scheduler.num_running:
                return
            self.step()
        raise TimeoutError("the scheduler makes no progress")


def check_output(seq: Sequence) -> None:
    prompt = seq.token_ids[: seq.num_prompt_tokens]
    output = seq.token_ids[seq.num_prompt_tokens :]
    assert output == expected_output(prompt, seq.max_total_tokens, seq.stop_token_ids)


def test_prompts_are_chunked_and_share_one_iteration():
    h = Harness()
    long, short = h.add(list(range(40))), h.add([1, 2, 3])
    first = h.step()
    assert [count for _, count in first.chunks] == [32]
    second = h.step()
    assert [count for _, count in second.chunks] == [8, 3]
    h.run()
    check_output(long)
    check_output(short)


def test_decoding_comes_first_and_prefill_gets_the_rest_of_the_budget():
    h = Harness()
    for i in range(4):
        h.add([i, 1, 2], max_tokens=20)
    h.step()
    h.add(list(range(100)))
    assert h.step().chunks[0][1] == 32 - 4


def test_no_plan_is_made_when_there_is_nothing_to_say():
    h = Harness(lookahead_tokens=32)
    h.add([1, 2, 3], max_tokens=8)
    assert h.step() is not None
    assert h.step() is None


def test_at_most_two_prefill_plans_are_in_flight():
    h = Harness()
    h.add(list(range(100)))
    assert h.plan().chunks
    assert h.plan().chunks
    assert h.plan() is None
    h.executor.run_iteration()
    h.scheduler.update(h.executor.results.popleft())
    assert h.plan().chunks


def test_slots_never_pause_while_memory_is_plentiful():
    h = Harness(ExecutorCapacity(256, 4, 8, 32, 128))
    seqs = [h.add([i, 2, 3, 4], max_tokens=60) for i in range(8)]
    h.run()
    assert h.executor.num_paused_decodes == 0
    for seq in seqs:
        check_output(seq)


def test_identical_prompts_arriving_together_are_computed_once():
    h = Harness()
    prompt = list(range(21))
    seqs = [h.add(prompt, max_tokens=3) for _ in range(4)]
    h.run()
    assert seqs[0].num_cached_tokens == 0
    assert [seq.num_cached_tokens for seq in seqs[1:]] == [20, 20, 20]
    for seq in seqs:
        check_output(seq)


def test_identical_long_prompts_wait_for_the_prefix_under_computation():
    h = Harness()
    prompt = list(range(90))
    first, second = h.add(prompt), h.add(prompt)
    other = h.add([7, 7, 7])
    h.run()
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 88)
    assert other.num_cached_tokens == 0
    for seq in (first, second, other):
        check_output(seq)


def test_a_promise_dies_with_the_sequence_that_made_it():
    h = Harness()
    prompt = list(range(90))
    first, second = h.add(prompt), h.add(prompt)
    h.step()
    h.scheduler.finish(first, FinishReason.ABORT)
    h.run()
    assert 0 < second.num_cached_tokens < 88
    check_output(second)


def test_a_full_prefix_hit_still_computes_the_last_token():
    h = Harness()
    h.add([1, 2, 3, 4, 5, 6, 7, 8])
    h.run()
    again = h.add([1, 2, 3, 4, 5, 6, 7, 8])
    h.run()
    assert again.num_cached_tokens == 4
    check_output(again)


def test_generated_tokens_serve_as_prefix_of_the_next_turn():
    """The last generated token was never fed back: its block is not complete."""
    h = Harness()
    first = h.add([1, 2, 3], max_tokens=21)
    h.run()
    second = h.add(first.token_ids + [9])
    h.run()
    assert second.num_cached_tokens == 20
    check_output(second)


def test_salts_and_the_switch_keep_prefixes_apart():
    h = Harness()
    h.add(list(range(20)), cache_salt="a")
    h.run()
    other = h.add(list(range(20)), cache_salt="b")
    h.run()
    assert other.num_cached_tokens == 0
    off = Harness(enable_prefix_caching=False)
    off.add(list(range(20)))
    off.run()
    again = off.add(list(range(20)))
    off.run()
    assert again.num_cached_tokens == 0


def test_higher_priority_is_admitted_first():
    h = Harness(ExecutorCapacity(64, 4, 1, 32, 128))
    low = h.add([2], max_tokens=5)
    high = h.add([3], max_tokens=5, priority=1)
    h.step()
    assert high.slot is not None
    assert low.status is SequenceStatus.WAITING
    h.run()
    assert low.is_finished


def test_waiting_outweighs_priority_in_time():
    h = Harness(ExecutorCapacity(64, 4, 1, 32, 128), priority_aging_s=10.0)
    patient = h.add([1], arrival_s=0.0)
    urgent = h.add([2], arrival_s=11.0, priority=1)
    h.step()
    assert patient.slot is not None
    assert urgent.status is SequenceStatus.WAITING


def test_the_newest_of_the_lowest_priority_is_preempted_and_resumes():
    h = Harness(ExecutorCapacity(8, 4, 4, 32, 32), lookahead_tokens=0)
    old = h.add([1, 2, 3], max_tokens=20)
    new = h.add([4, 5, 6], max_tokens=20)
    h.run()
    assert (old.num_preemptions, new.num_preemptions) == (0, 1)
    assert h.scheduler.stats.num_preemptions == 1
    check_output(old)
    check_output(new)


def test_recomputed_tokens_are_counted():
    h = Harness(ExecutorCapacity(8, 4, 4, 32, 32), lookahead_tokens=0, enable_prefix_caching=False)
    h.add([1, 2, 3], max_tokens=20)
    new = h.add([4, 5, 6], max_tokens=20)
    h.run()
    assert h.scheduler.stats.recomputed_tokens >= 8
    check_output(new)


def test_a_large_request_is_not_overtaken_forever():
    h = Harness(ExecutorCapacity(8, 4, 4, 32, 32))
    h.add([1, 2, 3], max_tokens=10)
    h.step()
    large = h.add(list(range(28)), max_tokens=4)
    small = [h.add([i], max_tokens=4) for i in range(6)]
    h.step()
    assert large.status is SequenceStatus.WAITING
    assert all(seq.status is SequenceStatus.WAITING for seq in small)
    h.run()
    check_output(large)


def test_a_stop_token_ends_a_sequence_and_its_blocks_are_free():
    h = Harness()
    (token, *_) = expected_output([1, 2, 3], 4, ())
    seq = h.add([1, 2, 3], max_tokens=20, stop_token_ids=(token,))
    h.run()
    assert seq.finish_reason is FinishReason.STOP
    assert seq.num_output_tokens == 1
    assert h.scheduler.blocks.num_owned == 0


def test_an_aborted_sequence_owns_nothing_and_its_late_tokens_are_dropped():
    h = Harness()
    seq = h.add([1, 2, 3], max_tokens=50)
    h.step()
    h.executor.run_iteration()
    tokens = list(seq.token_ids)
    h.scheduler.finish(seq, FinishReason.ABORT)
    assert h.scheduler.blocks.num_owned == 0
    other = h.add([4, 5, 6])
    h.run()
    assert seq.token_ids == tokens
    check_output(other)
    h.step()
    assert h.executor.num_occupied_slots == 0


def test_everything_resumes_on_another_executor():
    h = Harness()
    seqs = [h.add([i, i + 1, i + 2], max_tokens=12) for i in range(3)]
    for _ in range(4):
        h.step()
    displaced = h.scheduler.detach()
    assert {seq.seq_id for seq in displaced} <= {seq.seq_id for seq in seqs}
    assert displaced
    assert h.scheduler.schedule(0.0) is None
    capacity = ExecutorCapacity(16, 8, 2, 16, 128)
    h.scheduler.attach(capacity)
    h.executor = SimulatedExecutor(capacity)
    h.run()
    for seq in seqs:
        check_output(seq)


def test_what_an_executor_can_never_hold_is_known_once_it_is_attached():
    scheduler = Scheduler(SchedulerPolicy())
    small = Sequence(0, [1, 2], max_total_tokens=8)
    large = Sequence(1, [1, 2], max_total_tokens=100)
    assert scheduler.fits(large)
    scheduler.attach(ExecutorCapacity(8, 4, 4, 32, 128))
    assert scheduler.fits(small)
    assert not scheduler.fits(large)


def test_iteration_tokens_count_chunks_and_decodes():
    h = Harness()
    h.add(list(range(40)), max_tokens=3)
    h.run()
    assert h.iteration_tokens[:4] == [32, 8, 1, 1]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (StepResult(99, [], [], b""), "before it was sent"),
        (StepResult(1, [8], [1], b"\0"), "slot 8 does not exist"),
        (StepResult(1, [0], [1], b"\0"), "cannot have produced"),
        (StepResult(1, [0], [1], b"\7"), "unknown finish flag 7"),
    ],
)
def test_impossible_results_are_refused(result, message):
    h = Harness()
    seq = h.add(list(range(40)))
    h.plan()
    assert seq.slot == 0
    with pytest.raises(ExecutorProtocolError, match=message):
        h.scheduler.update(result)


def test_a_result_without_an_executor_is_refused():
    with pytest.raises(ExecutorProtocolError, match="no executor"):
        Scheduler(SchedulerPolicy()).update(StepResult(1, [], [], b""))


@pytest.mark.parametrize(
    ("flag", "num_tokens", "problem"),
    [
        (0, 4, "goes on beyond its longest length"),
        (2, 2, "ended before its longest length"),
    ],
)
def test_a_length_that_the_executor_reports_wrongly_breaks_the_protocol(flag, num_tokens, problem):
    harness = Harness()
    seq = harness.add([0, 1, 2], max_tokens=4)
    for _ in range(num_tokens - 1):
        harness.step()
    assert seq.num_output_tokens == num_tokens - 1
    wrong = StepResult(
        applied_step_id=1, slots=[seq.slot], token_ids=[1], finish_flags=bytes([flag])
    )
    with pytest.raises(ExecutorProtocolError, match=problem):
        harness.scheduler.update(wrong)
    # A sequence at its longest length could never be admitted again.
    assert seq.num_output_tokens == num_tokens - 1


def test_a_token_that_came_without_its_log_probabilities_is_not_kept():
    harness = Harness()
    seq = harness.add([0, 1, 2], max_tokens=4, sampling=SlotSampling(num_logprobs=2))
    harness.plan()
    wrong = StepResult(applied_step_id=1, slots=[seq.slot], token_ids=[1], finish_flags=bytes(1))
    with pytest.raises(ExecutorProtocolError, match="without log-probabilities"):
        harness.scheduler.update(wrong)
    assert seq.num_output_tokens == len(seq.logprobs) == 0


def test_a_sequence_that_is_withdrawn_and_comes_back_keeps_its_place_and_runs_once():
    h = Harness()
    first, second = (h.add([number, 1, 2], max_tokens=3) for number in range(2))
    h.scheduler.withdraw(first)
    assert h.scheduler.waiting() == [second]
    h.scheduler.add(first)
    assert h.scheduler.waiting() == [first, second]
    h.scheduler.verify()
    h.run()
    check_output(first)
    check_output(second)


def test_a_sequence_that_runs_cannot_be_withdrawn():
    h = Harness()
    seq = h.add([1, 2, 3], max_tokens=3)
    h.step()
    with pytest.raises(SequenceStateError, match="cannot move"):
        h.scheduler.withdraw(seq)


def test_hashes_of_a_prompt_belong_to_the_size_of_the_blocks():
    seq = Sequence(0, list(range(8)), max_total_tokens=9)
    large = seq.block_hashes(2, 4)
    small = seq.block_hashes(4, 2)
    assert len({*large, *small}) == 6
    assert seq.block_hashes(2, 4) == large
    assert Sequence(1, list(range(8)), max_total_tokens=9).block_hashes(4, 2) == small
