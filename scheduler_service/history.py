"""What happened to a sequence and when, for its trace. Kept only where somebody will read it."""

from dataclasses import dataclass, field
from enum import Enum


class EventKind(Enum):
    """A change of a sequence's place on the executor."""

    ADMITTED = "admitted"
    PREEMPTED = "preempted"
    EXECUTOR_LOST = "executor_lost"


@dataclass(frozen=True, slots=True)
class HistoryEvent:
    """One change. `time_s` is of the clock that the scheduler is given."""

    kind: EventKind
    time_s: float
    # Of an admission: the plan that says so, and the executor process that it was made for. Plans
    # are numbered anew in every session.
    step_id: int | None = None
    executor_epoch: int | None = None


@dataclass(slots=True)
class History:
    """Everything in order. Costs nothing per token."""

    events: list[HistoryEvent] = field(default_factory=list)
    # Numbers of the iterations that made the first and the last token, each in its session.
    first_iteration: int | None = None
    last_iteration: int | None = None

    def admitted(self, now_s: float, step_id: int, executor_epoch: int) -> None:
        """The sequence got a slot."""
        self.events.append(HistoryEvent(EventKind.ADMITTED, now_s, step_id, executor_epoch))

    def preempted(self, now_s: float) -> None:
        """The sequence lost its slot to others."""
        self.events.append(HistoryEvent(EventKind.PREEMPTED, now_s))

    def executor_lost(self, now_s: float) -> None:
        """The sequence lost its slot with the executor."""
        self.events.append(HistoryEvent(EventKind.EXECUTOR_LOST, now_s))
