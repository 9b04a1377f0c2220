"""Who is let in, who is told to come back and when, and that everything is given back."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.admission import Admission, AdmissionLimits
from scheduler_service.errors import (
    ClientLimitError,
    NeverFitsError,
    QueueFullError,
    QueueTokensError,
    QueueWaitError,
    ResponseMemoryError,
    RetryableError,
)
from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.load import FleetLoad
from scheduler_service.lengths import SequenceLengths
from scheduler_service.scheduler import SchedulerPolicy
from scheduler_service.sequence import FinishReason, Sequence, SequenceId
from scheduler_service.validation import GenerateSpec, validate_generate
from tests.scheduler_service.engine_harness import CAPACITY, MODEL, NO_LIMITS

PROMPT = [0, 1, 2]
LIMITS = replace(NO_LIMITS, max_queued_requests=100)


def spec(**params) -> GenerateSpec:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=PROMPT), sampling_params=pb.SamplingParams(**params)
    )
    return validate_generate(request, MODEL)


class Desk:
    """An admission whose clock and queue the test moves."""

    def __init__(self, limits: AdmissionLimits, *, connected: bool = True) -> None:
        self.now_s = 0.0
        fleet = Fleet(SchedulerPolicy())
        self.scheduler = fleet.join("unix:/executor").scheduler
        if connected:
            self.scheduler.attach(CAPACITY)
        load = FleetLoad(fleet)
        lengths = SequenceLengths(MODEL, load)
        self.admission = Admission(limits, load, lengths, lambda: self.now_s)
        self.running: list[Sequence] = []
        self._count = 0

    def enqueue(self, count: int, priority: int = 0, max_total_tokens: int = 20) -> None:
        for _ in range(count):
            self._count += 1
            seq = Sequence(
                SequenceId(self._count),
                PROMPT,
                max_total_tokens=max_total_tokens,
                priority=priority,
                arrival_s=self.now_s,
            )
            self.scheduler.add(seq)
            self.running.append(seq)

    def plan(self) -> None:
        """Plans until nothing more can be admitted."""
        while self.scheduler.schedule(self.now_s) is not None:
            # As if the executor had computed all chunks.
            self.scheduler._prefill_plans.clear()
        self.admission.observe_plan(self.now_s)

    def finish(self, count: int, service_time_s: float) -> None:
        """Ends the oldest sequences."""
        for seq in self.running[:count]:
            self.scheduler.finish(seq, FinishReason.LENGTH)
            self.admission.observe_service_time(service_time_s)
        del self.running[:count]

    def run(self, rounds: int, service_time_s: float) -> None:
        """Full batches of 8 that take `service_time_s`, with a queue behind them."""
        for _ in range(rounds):
            self.enqueue(16 - len(self.running))
            self.plan()
            for _ in range(8):
                self.now_s += service_time_s / 8
                self.finish(1, service_time_s)
                self.plan()

    def fill_queue(self) -> int:
        """Enqueues until a request is refused for its wait; returns how many were not."""
        for count in range(200):
            try:
                self.admission.check_arrival("a", 0)
            except QueueWaitError:
                return count
            self.enqueue(1)
        pytest.fail("the queue has no bound")


def test_the_queue_holds_so_many_sequences_and_no_more():
    desk = Desk(replace(LIMITS, max_queued_requests=3), connected=False)
    first = desk.admission.reserve(spec(n=2), "a")
    with pytest.raises(QueueFullError, match="2 sequences wait already, the limit is 3"):
        desk.admission.reserve(spec(n=2), "a")
    first.release()
    desk.admission.reserve(spec(n=3), "a")
    with pytest.raises(QueueFullError):
        desk.admission.check_arrival("a", 0)


def test_the_queue_holds_so_many_tokens_but_an_empty_one_takes_anything():
    desk = Desk(replace(LIMITS, max_queued_tokens=50), connected=False)
    desk.admission.check_queue(spec(max_tokens=9), 100)
    desk.enqueue(2, max_total_tokens=20)
    desk.admission.check_queue(spec(max_tokens=7), 10)
    with pytest.raises(QueueTokensError, match="sequences of 40 tokens wait"):
        desk.admission.check_queue(spec(max_tokens=8), 11)
    # Known to be too much before the prompt is.
    with pytest.raises(QueueTokensError):
        desk.admission.reserve(spec(n=5, max_tokens=2), "a")


def test_one_client_has_so_many_requests_and_others_are_not_counted():
    desk = Desk(replace(LIMITS, max_requests_per_client=2))
    held = []
    for _ in range(2):
        desk.admission.check_arrival("a", 0)
        held.append(desk.admission.reserve(spec(max_tokens=4), "a"))
    with pytest.raises(ClientLimitError):
        desk.admission.check_arrival("a", 0)
    desk.admission.check_arrival("b", 0)
    held[0].submitted()
    with pytest.raises(ClientLimitError):
        desk.admission.check_arrival("a", 0)
    held[0].release()
    held[0].release()
    desk.admission.check_arrival("a", 0)


def test_unread_logprobs_are_bounded_over_all_requests():
    # 10 tokens with 20 log-probabilities: 10 x (256 + 20 x 72).
    desk = Desk(replace(LIMITS, max_response_bytes=40_000))
    first = desk.admission.reserve(spec(max_tokens=10, logprobs=20), "a")
    desk.admission.reserve(spec(max_tokens=10, logprobs=20), "a")
    with pytest.raises(ResponseMemoryError):
        desk.admission.reserve(spec(max_tokens=10, logprobs=20), "a")
    desk.admission.reserve(spec(max_tokens=100), "a")
    first.release()
    desk.admission.reserve(spec(max_tokens=10, logprobs=20), "a")
    with pytest.raises(NeverFitsError, match="lower n, max_tokens or logprobs"):
        desk.admission.reserve(spec(max_tokens=10, n=3, logprobs=20), "a")


def test_a_max_tokens_that_no_prompt_makes_fit_is_refused_before_the_prompt_is_read():
    desk = Desk(LIMITS)
    desk.scheduler.attach(replace(CAPACITY, num_blocks=4))
    with pytest.raises(NeverFitsError, match="need 17 tokens of KV cache, but it holds 16"):
        desk.admission.reserve(spec(max_tokens=17), "a")
    desk.admission.reserve(spec(max_tokens=16), "a")


def test_before_anything_is_measured_another_batch_may_wait():
    desk = Desk(replace(LIMITS, max_queue_wait_s=None))
    desk.enqueue(8)
    desk.plan()
    desk.enqueue(7)
    desk.admission.check_arrival("a", 0)
    desk.enqueue(1)
    with pytest.raises(QueueWaitError, match="nothing is known"):
        desk.admission.check_arrival("a", 0)


@pytest.mark.parametrize("service_time_s", [0.2, 2.0, 60.0])
def test_by_default_a_request_waits_for_half_the_time_that_it_takes(service_time_s: float):
    desk = Desk(replace(LIMITS, max_queue_wait_s=None))
    desk.run(20, service_time_s)
    assert desk.scheduler.num_running == 8
    for seq in desk.running[8:]:
        desk.scheduler.finish(seq, FinishReason.ABORT)
    del desk.running[8:]
    # A batch of 8 makes room for 4 in half of its time; the wait is below the bound up to there.
    assert desk.fill_queue() == 5


def test_a_bound_in_seconds_holds_whatever_the_requests_take():
    desk = Desk(replace(LIMITS, max_queue_wait_s=10.0))
    desk.run(20, 2.0)
    desk.fill_queue()
    # 4 a second for 10 seconds.
    assert 40 <= desk.scheduler.num_waiting <= 42


def test_an_urgent_request_waits_for_its_equals_only():
    desk = Desk(replace(LIMITS, max_queue_wait_s=1.0))
    desk.run(20, 2.0)
    desk.enqueue(10, priority=0)
    with pytest.raises(QueueWaitError):
        desk.admission.check_arrival("a", 0)
    desk.admission.check_arrival("a", 1)
    desk.enqueue(10, priority=1)
    with pytest.raises(QueueWaitError):
        desk.admission.check_arrival("a", 1)
    desk.admission.check_arrival("a", 2)


def test_prompts_that_are_being_tokenized_count_as_waiting():
    desk = Desk(replace(LIMITS, max_queue_wait_s=1.0))
    desk.run(20, 2.0)
    before = desk.admission.expected_wait_s(0)
    ticket = desk.admission.reserve(spec(max_tokens=17, n=4), "a")
    after = desk.admission.expected_wait_s(0)
    assert before is not None
    assert after == pytest.approx(before + 1.0, rel=0.1)
    ticket.release()
    assert desk.admission.expected_wait_s(0) == before


def test_without_an_executor_requests_wait_for_it():
    desk = Desk(replace(LIMITS, max_queue_wait_s=0.001), connected=False)
    desk.enqueue(50)
    desk.admission.check_arrival("a", 0)


def test_the_hint_is_the_time_until_what_waits_has_its_turn():
    desk = Desk(replace(LIMITS, max_queue_wait_s=0.1))
    desk.run(20, 2.0)
    desk.enqueue(20 - desk.scheduler.num_waiting)
    with pytest.raises(QueueWaitError) as caught:
        desk.admission.check_arrival("a", 0)
    assert caught.value.retry_after_s == pytest.approx(5.0, rel=0.1)


@given(count=st.integers(0, 90), service_time_s=st.floats(0.01, 1000), rounds=st.integers(0, 8))
def test_every_hint_is_between_a_tenth_of_a_second_and_thirty(count, service_time_s, rounds):
    desk = Desk(replace(LIMITS, max_queued_requests=0, max_queue_wait_s=None))
    desk.run(rounds, service_time_s)
    desk.enqueue(count)
    with pytest.raises(RetryableError) as caught:
        desk.admission.check_arrival("a", 0)
    assert 0.1 <= caught.value.retry_after_s <= 30


@given(
    orders=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 8), st.booleans(), st.booleans()),
        max_size=30,
    ),
    data=st.data(),
)
def test_whatever_is_taken_is_given_back(orders, data):
    desk = Desk(replace(LIMITS, max_queued_requests=40, max_response_bytes=50_000), connected=False)
    tickets = []
    for client, n, logprobs, submitted in orders:
        params = {"logprobs": 5} if logprobs else {}
        try:
            ticket = desk.admission.reserve(spec(n=n, max_tokens=5, **params), client)
        except RetryableError:
            continue
        if submitted:
            ticket.submitted()
        tickets.append(ticket)
    for ticket in data.draw(st.permutations(tickets)):
        ticket.release()
    assert desk.admission.num_reserved == 0
    assert desk.admission._requests_of == {}
    assert desk.admission._response_bytes == 0
