"""The order of an executor's step results, which holds within one session."""

from scheduler_service.plan import StepResult


class ResultOrderError(ValueError):
    """A result came twice, late, too early, or from another session."""


class ResultOrder:
    """Refuses a result that cannot be the next one of its session."""

    def __init__(self) -> None:
        self._iteration = 0
        self._applied_step_id = 0

    def check(self, result: StepResult) -> None:
        """Takes in the next result. Raises ResultOrderError."""
        # Reports of plans that left nothing to run have no iteration.
        if result.iteration and result.iteration != self._iteration + 1:
            raise ResultOrderError(
                f"iteration {result.iteration} came after iteration {self._iteration}"
            )
        if not result.iteration and result.slots:
            raise ResultOrderError("tokens came without an iteration")
        if result.applied_step_id < self._applied_step_id:
            raise ResultOrderError(
                f"plan {result.applied_step_id} was reported after plan {self._applied_step_id}"
            )
        self._iteration = result.iteration or self._iteration
        self._applied_step_id = result.applied_step_id
