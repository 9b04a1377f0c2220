"""Ranges of the sampling parameters, for requests and for the defaults of a model alike."""

import math
from dataclasses import dataclass

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from `low` to `high`, with `high` and, unless it is excluded, with `low`."""

    low: float
    high: float
    excludes_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value is a finite number of the range."""
        if not math.isfinite(value) or (self.excludes_low and value == self.low):
            return False
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.excludes_low else '['}{self.low}, {self.high}]"


#: Of the parameters that a model's generation_config.json may give defaults for.
SAMPLING_RANGES = {
    "temperature": Range(0, 100),
    "top_p": Range(0, 1, excludes_low=True),
    "top_k": Range(-1, INT32_MAX),
    "min_p": Range(0, 1),
    "repetition_penalty": Range(0, 10, excludes_low=True),
}
