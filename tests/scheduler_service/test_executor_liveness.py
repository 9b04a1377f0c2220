"""When an executor counts as lost."""

from itertools import count, takewhile

import pytest

from scheduler_service.link.executor_liveness import ExecutorLiveness, LivenessLimits

LIMITS = LivenessLimits(silence_timeout_s=5.0, stall_timeout_s=60.0)


def check_until(
    liveness: ExecutorLiveness, start_s: float, end_s: float, *, has_work: bool, beats: bool
) -> str | None:
    """Checks as the link does; returns the first problem."""
    interval_s = LIMITS.check_interval_s
    times = takewhile(lambda now_s: now_s < end_s, (start_s + i * interval_s for i in count()))
    for now_s in times:
        if beats:
            liveness.on_heartbeat(0, now_s)
        problem = liveness.problem(has_work=has_work, now_s=now_s)
        if problem is not None:
            return problem
    return None


@pytest.mark.parametrize("has_work", [True, False])
def test_an_executor_that_sends_nothing_is_lost_idle_or_not(has_work: bool):
    liveness = ExecutorLiveness(LIMITS, 0.0)
    assert check_until(liveness, 0.0, 5.0, has_work=has_work, beats=False) is None
    assert "sent nothing" in (check_until(liveness, 5.0, 6.0, has_work=has_work, beats=False) or "")


def test_a_long_iteration_is_no_loss_while_heartbeats_come():
    liveness = ExecutorLiveness(LIMITS, 0.0)
    assert check_until(liveness, 0.0, 60.0, has_work=True, beats=True) is None
    assert "no progress" in (check_until(liveness, 60.0, 61.0, has_work=True, beats=True) or "")


def test_an_idle_executor_owes_no_progress_and_the_clock_starts_with_the_work():
    liveness = ExecutorLiveness(LIMITS, 0.0)
    assert check_until(liveness, 0.0, 1000.0, has_work=False, beats=True) is None
    assert check_until(liveness, 1000.0, 1059.0, has_work=True, beats=True) is None
    assert check_until(liveness, 1059.0, 1061.0, has_work=True, beats=True) is not None


def test_an_iteration_that_a_heartbeat_counts_is_progress():
    liveness = ExecutorLiveness(LIMITS, 0.0)
    assert check_until(liveness, 0.0, 50.0, has_work=True, beats=True) is None
    liveness.on_heartbeat(1, 50.0)
    assert check_until(liveness, 50.0, 109.0, has_work=True, beats=True) is None


def test_a_scheduler_that_was_stopped_itself_does_not_blame_the_executor():
    liveness = ExecutorLiveness(LIMITS, 0.0)
    assert check_until(liveness, 0.0, 1.0, has_work=True, beats=True) is None
    assert liveness.problem(has_work=True, now_s=100.0) is None
    assert check_until(liveness, 100.5, 104.0, has_work=True, beats=False) is None
    assert check_until(liveness, 104.0, 107.0, has_work=True, beats=False) is not None


def test_results_are_a_sign_of_life_and_of_progress():
    liveness = ExecutorLiveness(LIMITS, 0.0)
    for second in range(200):
        liveness.on_results(float(second))
        for half in (0.0, 0.5):
            assert liveness.problem(has_work=True, now_s=second + half) is None


def test_an_executor_is_suspect_long_before_it_counts_as_lost_and_until_it_gives_a_sign():
    liveness = ExecutorLiveness(LivenessLimits(silence_timeout_s=4.0, stall_timeout_s=60.0), 0.0)
    assert not liveness.is_suspect(1.5)
    assert liveness.is_suspect(1.7)
    assert liveness.problem(has_work=False, now_s=1.7) is None
    liveness.on_heartbeat(0, 1.8)
    assert not liveness.is_suspect(1.9)


def test_a_busy_executor_that_only_beats_becomes_suspect_and_an_idle_one_does_not():
    for has_work in (True, False):
        liveness = ExecutorLiveness(LivenessLimits(4.0, 60.0), 0.0)
        for tick in range(1, 66):
            now_s = tick * 0.4
            liveness.on_heartbeat(0, now_s)
            assert liveness.problem(has_work=has_work, now_s=now_s) is None
        assert liveness.is_suspect(now_s) == has_work
