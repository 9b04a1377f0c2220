"""Which step results can follow each other."""

import pytest

from scheduler_service.link.result_order import ResultOrder, ResultOrderError
from scheduler_service.plan import StepResult


def result(iteration: int, applied_step_id: int, slots: int = 1) -> StepResult:
    return StepResult(applied_step_id, [0] * slots, [1] * slots, bytes(slots), iteration=iteration)


def report(applied_step_id: int) -> StepResult:
    return result(0, applied_step_id, slots=0)


def test_iterations_count_up_and_reports_of_plans_lie_between():
    order = ResultOrder()
    for item in (report(1), result(1, 2), result(2, 2), report(3), report(4), result(3, 4)):
        order.check(item)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (result(2, 5), "iteration 2 came after iteration 2"),
        (result(1, 5), "iteration 1 came after iteration 2"),
        (result(4, 5), "iteration 4 came after iteration 2"),
        (result(3, 4), "plan 4 was reported after plan 5"),
        (report(4), "plan 4 was reported after plan 5"),
        (result(0, 5), "tokens came without an iteration"),
    ],
    ids=["twice", "late", "gap", "older plan", "older report", "no iteration"],
)
def test_a_result_that_cannot_be_the_next_is_refused(wrong: StepResult, problem: str):
    order = ResultOrder()
    order.check(result(1, 1))
    order.check(result(2, 5))
    with pytest.raises(ResultOrderError, match=problem):
        order.check(wrong)
