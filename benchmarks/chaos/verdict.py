"""Compares what clients received with an undisturbed run."""

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from benchmarks.chaos.client import Ending, Outcome, Part
from nanovllm.outputs import FinishReason

_MAX_EXAMPLES = 10
# Log-probabilities depend on the batch in their last bits.
_LOGPROB_TOLERANCE = 1e-3


@dataclass(slots=True)
class Verdict:
    """Everything that was wrong, and how much was looked at."""

    num_requests: int = 0
    num_resumes: int = 0
    num_tokens: int = 0
    endings: Counter[str] = field(default_factory=Counter)
    behaviours: Counter[str] = field(default_factory=Counter)
    num_lost_tokens: int = 0
    num_repeated_tokens: int = 0
    num_changed_tokens: int = 0
    # Completions whose text, end, usage or log-probabilities were wrong though the tokens were not.
    num_wrong_fields: int = 0
    # Completions that an undisturbed repetition, alone in its batch, gave as well.
    num_ties: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether every promise was kept."""
        return not (
            self.num_lost_tokens
            or self.num_repeated_tokens
            or self.num_changed_tokens
            or self.num_wrong_fields
            or self.endings[Ending.FAILED.value]
            or self.endings[Ending.STUCK.value]
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_requests": self.num_requests,
            "num_tokens": self.num_tokens,
            "num_resumes": self.num_resumes,
            "behaviours": dict(self.behaviours),
            "endings": dict(self.endings),
            "num_lost_tokens": self.num_lost_tokens,
            "num_repeated_tokens": self.num_repeated_tokens,
            "num_changed_tokens": self.num_changed_tokens,
            "num_wrong_fields": self.num_wrong_fields,
            "num_ties": self.num_ties,
            "examples": self.examples,
        }

    def count(self, outcome: Outcome) -> None:
        """Counts a request in, right or wrong."""
        self.num_requests += 1
        self.num_resumes += outcome.num_resumes
        self.num_tokens += sum(len(part.token_ids) for part in outcome.parts.values())
        self.endings[outcome.ending.value] += 1
        self.behaviours[outcome.case.behaviour.value] += 1
        if outcome.ending in (Ending.FAILED, Ending.STUCK):
            self._note(f"{outcome.case.name}: {outcome.ending.value} {outcome.error}")

    def compare(self, outcome: Outcome, expected: dict[int, Part]) -> None:
        """Adds up the differences to what was expected."""
        for index, part in outcome.parts.items():
            self._compare_part(f"{outcome.case.name}[{index}]", part, expected[index])
        if outcome.ending is Ending.COMPLETE:
            for index in expected.keys() - outcome.parts.keys():
                self.num_lost_tokens += len(expected[index].token_ids)
                self._note(f"{outcome.case.name}[{index}]: nothing came")

    def _compare_part(self, name: str, part: Part, expected: Part) -> None:
        if not is_whole(part):
            problem = prefix_problem(part, expected)
            if problem:
                self.num_changed_tokens += 1
                self._note(f"{name}: {problem} of what was to come")
            return
        got, due = part.token_ids, expected.token_ids
        lost, repeated = max(0, len(due) - len(got)), max(0, len(got) - len(due))
        changed = sum(a != b for a, b in zip(got, due, strict=False))
        self.num_lost_tokens += lost
        self.num_repeated_tokens += repeated
        self.num_changed_tokens += changed
        if lost or repeated or changed:
            self._note(f"{name}: {got} instead of {due}")
        elif wrong := wrong_fields(part, expected):
            self.num_wrong_fields += 1
            self._note(f"{name}: {', '.join(wrong)} differ")

    def _note(self, example: str) -> None:
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append(example)


def matches(outcome: Outcome, expected: dict[int, Part]) -> bool:
    """Whether an outcome has nothing wrong."""
    trial = Verdict()
    trial.compare(outcome, expected)
    return trial.is_clean


def is_whole(part: Part) -> bool:
    """Whether a completion ran to its own end."""
    return part.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def prefix_problem(part: Part, expected: Part) -> str:
    """What is no prefix of the expected completion, or ''."""
    if part.token_ids != expected.token_ids[: len(part.token_ids)]:
        return "tokens are no prefix"
    # An abort shows held back text, which a stop string might have taken away.
    is_cut = part.finish_reason is FinishReason.ABORT
    if not is_cut and not expected.text.startswith(part.text):
        return "text is no prefix"
    return ""


def wrong_fields(part: Part, expected: Part) -> list[str]:
    """Names what differs besides the tokens."""
    wrong = [
        name
        for name in ("text", "finish_reason", "stop_reason", "usage")
        if getattr(part, name) != getattr(expected, name)
    ]
    pairs = zip_longest(part.logprobs, expected.logprobs, fillvalue=math.nan)
    if not all(math.isclose(a, b, abs_tol=_LOGPROB_TOLERANCE) for a, b in pairs):
        wrong.append("logprobs")
    return wrong
