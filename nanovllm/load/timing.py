"""What one request of a load run did, and distributions over many."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """How a request ended that did not get its whole answer."""

    #: gRPC status such as "RESOURCE_EXHAUSTED", "HTTP 429", or what the tool itself noticed.
    code: str
    message: str
    #: Whether the server turned it down before any token, rather than failing at it.
    is_refusal: bool


@dataclass(slots=True)
class RequestTiming:
    """What one request did; times in seconds.

    `started_s` is when the request was due, since the start of the run. All latencies count from
    there, also where it was sent later: leaving out the time that a request spent waiting to be
    sent would hide the server's slowness from the figures (coordinated omission).
    """

    started_s: float
    #: Time to the first token; None if none came.
    ttft_s: float | None = None
    e2e_s: float = 0.0
    #: Time between tokens, one entry per token after the first delta. Tokens that came in one delta
    #: share its gap evenly, so that coalescing neither hides nor invents a pause.
    itl_s: list[float] = field(default_factory=list)
    #: How much later than due it was sent.
    send_delay_s: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    #: Tokens of the first delta, which have no entry in `itl_s`.
    num_first_tokens: int = 0
    num_deltas: int = 0
    #: None if the whole answer came.
    failure: RequestFailure | None = None

    @property
    def end_s(self) -> float:
        """When it ended, since the start of the run."""
        return self.started_s + self.e2e_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None without a second token."""
        if self.num_output_tokens < 2:
            return None
        return sum(self.itl_s) / (self.num_output_tokens - 1)

    def as_dict(self) -> dict[str, Any]:
        """Returns it for JSON, with the longest time between tokens instead of each."""
        values = asdict(self)
        del values["itl_s"]
        return values | {"max_itl_s": max(self.itl_s, default=None), "tpot_s": self.tpot_s}


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Distribution of a latency in seconds."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles | None":
        """Returns the percentiles of `values`, interpolated linearly; None if there are none."""
        if not values:
            return None
        array = np.asarray(values)
        return cls(float(array.mean()), *map(float, np.percentile(array, [50, 90, 95, 99])))
