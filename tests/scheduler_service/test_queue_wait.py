"""The estimate of a new request's wait, against queues whose speed is known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_service.queue_wait import DrainRate, Load, ServiceTime, expected_wait_s

COST = 100


def drained(rate: DrainRate, seqs_per_s: float, duration_s: float, start_s: float = 0.0) -> float:
    """A queue that is never empty and loses sequences evenly; returns the time at the end."""
    count = int(seqs_per_s * duration_s)
    for number in range(count + 1):
        rate.observe(start_s + number / seqs_per_s, 10 * COST, number * COST)
    return start_s + count / seqs_per_s


def test_nothing_is_known_before_anything_left_the_queue():
    rate = DrainRate()
    rate.observe(0.0, 0, 0)
    assert rate.tokens_per_s(0.0) is None
    rate.observe(1.0, COST, 0)
    assert rate.tokens_per_s(100.0) is None


@given(seqs_per_s=st.floats(0.02, 5000))
def test_an_even_flow_is_measured_whatever_its_speed(seqs_per_s: float):
    rate = DrainRate()
    end_s = drained(rate, seqs_per_s, max(3.0, 8 / seqs_per_s))
    assert rate.tokens_per_s(end_s) == pytest.approx(seqs_per_s * COST, rel=0.05)


def test_time_without_a_backlog_does_not_count():
    rate = DrainRate()
    # A sequence a second passes through within 10 ms: no backlog to speak of.
    for second in range(100):
        rate.observe(second, COST, second * COST)
        rate.observe(second + 0.01, 0, (second + 1) * COST)
    assert rate.tokens_per_s(100.0) == pytest.approx(COST / 0.01, rel=0.2)


def test_a_stalled_queue_slows_down_while_nothing_is_reported():
    rate = DrainRate()
    end_s = drained(rate, 10, 5)
    running = rate.tokens_per_s(end_s)
    assert running is not None
    stalled = rate.tokens_per_s(end_s + 45)
    assert stalled == pytest.approx(running / 10, rel=0.05)


def test_a_new_speed_replaces_the_old_one_within_the_window():
    rate = DrainRate()
    end_s = drained(rate, 100, 20)
    admitted = 2000 * COST
    for number in range(1, 121):
        rate.observe(end_s + number / 10, 10 * COST, admitted + number * COST)
    assert rate.tokens_per_s(end_s + 12) == pytest.approx(10 * COST, rel=0.1)


def test_a_long_pause_is_forgotten_with_everything_before_it():
    rate = DrainRate()
    end_s = drained(rate, 10, 5)
    rate.observe(end_s, 0, 60 * COST)
    rate.observe(end_s + 1, COST, 60 * COST)
    assert rate.tokens_per_s(end_s + 1) is not None
    rate.observe(end_s + 2, 0, 61 * COST)
    rate.observe(end_s + 60, COST, 61 * COST)
    assert rate.tokens_per_s(end_s + 60) is None


def test_the_absence_of_an_executor_does_not_count_as_slowness():
    rate = DrainRate()
    end_s = drained(rate, 10, 5)
    before = rate.tokens_per_s(end_s)
    rate.pause(end_s)
    assert rate.tokens_per_s(end_s + 60) == pytest.approx(before)
    # The first plan for the next executor finds a queue and starts the clock again.
    rate.observe(end_s + 1, 10 * COST, 50 * COST)
    assert rate.tokens_per_s(end_s + 1) == pytest.approx(before)


@given(
    gaps_s=st.lists(st.floats(0, 100), min_size=1, max_size=60),
    waiting=st.lists(st.integers(0, 10**9), min_size=60, max_size=60),
    left=st.lists(st.integers(0, 10**6), min_size=60, max_size=60),
)
def test_the_rate_is_never_negative_and_never_kept_without_bound(gaps_s, waiting, left):
    rate, now_s, admitted = DrainRate(), 0.0, 0
    for gap_s, tokens, count in zip(gaps_s, waiting, left, strict=False):
        now_s += gap_s
        admitted += count
        rate.observe(now_s, tokens, admitted)
        measured = rate.tokens_per_s(now_s)
        assert measured is None or measured >= 0
    assert len(rate._buckets) <= 110


def test_the_service_time_is_a_mean_that_follows():
    service_time = ServiceTime()
    assert service_time.mean_s is None
    service_time.observe(2.0)
    service_time.observe(4.0)
    assert service_time.mean_s == pytest.approx(3.0)
    for _ in range(1000):
        service_time.observe(10.0)
    assert service_time.mean_s == pytest.approx(10.0, rel=0.01)


def test_nobody_ahead_means_no_wait():
    assert expected_wait_s(Load(0, 500, is_full=True), None, None) == 0


def test_a_full_batch_makes_room_as_littles_law_says():
    # 8 sequences that take 4 s each make room for 2 a second.
    wait_s = expected_wait_s(Load(6 * COST, 8 * COST, is_full=True), None, 4.0)
    assert wait_s == pytest.approx(3.0)


def test_a_batch_that_fills_up_is_measured_by_what_leaves_the_queue():
    load = Load(6 * COST, COST, is_full=False)
    assert expected_wait_s(load, 3.0 * COST, 4.0) == pytest.approx(2.0)
    assert expected_wait_s(load, None, 4.0) is None


@given(
    ahead=st.integers(0, 10**9),
    more=st.integers(0, 10**9),
    running=st.integers(1, 10**9),
    rate=st.one_of(st.none(), st.floats(0.1, 1e9)),
    service=st.one_of(st.none(), st.floats(0.001, 1e4)),
    is_full=st.booleans(),
)
def test_more_ahead_never_means_less_wait(ahead, more, running, rate, service, is_full):
    shorter = expected_wait_s(Load(ahead, running, is_full), rate, service)
    longer = expected_wait_s(Load(ahead + more, running, is_full), rate, service)
    if shorter is not None and longer is not None:
        assert longer >= shorter
