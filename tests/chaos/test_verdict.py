"""The judge itself: it must see what is wrong."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.chaos.cases import Behaviour, make_cases
from benchmarks.chaos.client import Ending, Outcome, Part
from benchmarks.chaos.faults import FAULTS, make_schedule
from benchmarks.chaos.run import ChaosReport
from benchmarks.chaos.verdict import Verdict, matches
from nanovllm.outputs import FinishReason

CASE = make_cases(1, seed=0)[0]
EXPECTED = {
    0: Part([1, 2, 3, 4], "abcd", [-0.5] * 4, FinishReason.LENGTH, None, (7, 4)),
    1: Part([5, 6], "ef", [-0.5] * 2, FinishReason.STOP, 6, (7, 2)),
}


def outcome(ending: Ending = Ending.COMPLETE, parts: dict[int, Part] = EXPECTED) -> Outcome:
    return Outcome(CASE, ending, parts)


def with_first(**changes) -> dict[int, Part]:
    return {0: replace(EXPECTED[0], **changes), 1: EXPECTED[1]}


def judged(found: Outcome) -> Verdict:
    verdict = Verdict()
    verdict.count(found)
    verdict.compare(found, EXPECTED)
    return verdict


def test_what_was_expected_is_clean():
    assert judged(outcome()).is_clean
    assert matches(outcome(parts=with_first(logprobs=[-0.5001] * 4)), EXPECTED)


@pytest.mark.parametrize(
    ("parts", "counter", "count"),
    [
        (with_first(token_ids=[1, 2, 3]), "num_lost_tokens", 1),
        (with_first(token_ids=[1, 2, 2, 3, 4]), "num_repeated_tokens", 1),
        (with_first(token_ids=[1, 9, 3, 9]), "num_changed_tokens", 2),
        (with_first(text="abc"), "num_wrong_fields", 1),
        (with_first(usage=(7, 5)), "num_wrong_fields", 1),
        (with_first(logprobs=[-0.5] * 3), "num_wrong_fields", 1),
        (with_first(logprobs=[-0.5, -0.5, -0.6, -0.5]), "num_wrong_fields", 1),
        (with_first(stop_reason="x", finish_reason=FinishReason.STOP), "num_wrong_fields", 1),
        ({0: EXPECTED[0]}, "num_lost_tokens", 2),
    ],
)
def test_every_difference_is_counted(parts: dict[int, Part], counter: str, count: int):
    verdict = judged(outcome(parts=parts))
    assert getattr(verdict, counter) == count
    assert not verdict.is_clean
    assert verdict.examples


@pytest.mark.parametrize("ending", [Ending.FAILED, Ending.STUCK])
def test_a_request_that_failed_or_hangs_is_a_broken_promise(ending: Ending):
    assert not judged(outcome(ending, {})).is_clean


def test_a_request_that_ended_early_needs_only_a_prefix():
    cut = {0: Part([1, 2], "ab")}
    assert judged(outcome(Ending.BROKEN, cut)).is_clean
    for wrong in (Part([1, 3], "ab"), Part([1, 2], "ax")):
        assert not judged(outcome(Ending.LEFT, {0: wrong})).is_clean
    # Held back text comes with an abort.
    aborted = Part([1, 2], "ab\ufffd", finish_reason=FinishReason.ABORT)
    assert judged(outcome(parts={0: aborted, 1: EXPECTED[1]})).is_clean


def test_a_leak_or_a_failed_fault_spoils_a_run():
    assert ChaosReport().is_clean
    assert not ChaosReport(leaks=["1 slots of the executor"]).is_clean
    assert not ChaosReport(failed_faults=["kill_executor: TimeoutError()"]).is_clean


def test_the_same_seed_makes_the_same_run():
    assert make_cases(30, seed=4) == make_cases(30, seed=4) != make_cases(30, seed=5)
    assert {case.behaviour for case in make_cases(30, seed=4)} == set(Behaviour)
    schedule = make_schedule(2 * len(FAULTS), list(FAULTS), random.Random(1))
    assert schedule == make_schedule(2 * len(FAULTS), list(FAULTS), random.Random(1))
    assert set(Counter(schedule).values()) == {2}
