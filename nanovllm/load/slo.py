"""Service level objectives of single requests, and the goodput under them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from nanovllm.load.timing import RequestTiming

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_LIMIT = re.compile(r"(\w+)\s*=\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s)")


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds that one request has to keep, all of them; None sets no limit."""

    #: Time to the first token.
    ttft_s: float | None = None
    #: The longest time between two of its tokens.
    itl_s: float | None = None
    #: The mean time between its tokens.
    tpot_s: float | None = None
    #: Time to its end.
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Slo":
        """Reads limits such as "ttft=500ms,itl=50ms,e2e=10s".

        Raises:
            ValueError: A part is no limit; the message says what one looks like.
        """
        known = [field.name.removesuffix("_s") for field in fields(cls)]
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = _LIMIT.fullmatch(part.strip())
            if match is None or match[1] not in known:
                raise ValueError(
                    f"{part.strip()!r} is no objective; write NAME=TIME, with a name of "
                    f"{', '.join(known)} and a time such as 500ms or 10s"
                )
            name = f"{match[1]}_s"
            if name in limits:
                raise ValueError(f"{match[1]} is given twice")
            limits[name] = float(match[2]) * _SECONDS[match[3]]
        return cls(**limits)

    def is_met_by(self, timing: RequestTiming) -> bool:
        """Whether a request got its whole answer within every limit."""
        if timing.failure is not None:
            return False
        if self.ttft_s is not None and (timing.ttft_s is None or timing.ttft_s > self.ttft_s):
            return False
        if self.itl_s is not None and max(timing.itl_s, default=0.0) > self.itl_s:
            return False
        if self.tpot_s is not None and (timing.tpot_s or 0.0) > self.tpot_s:
            return False
        return self.e2e_s is None or timing.e2e_s <= self.e2e_s


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met an objective ("DistServe", Zhong et al., 2024, arXiv:2401.09670)."""

    slo: Slo
    num_good: int
    #: Of all requests sent, refused and failed ones among them.
    share: float
    requests_per_s: float

    @classmethod
    def of(cls, timings: Sequence[RequestTiming], slo: Slo, duration_s: float) -> "Goodput":
        """Counts the requests of a run of `duration_s`."""
        num_good = sum(slo.is_met_by(timing) for timing in timings)
        return cls(
            slo=slo,
            num_good=num_good,
            share=num_good / len(timings) if timings else 0.0,
            requests_per_s=num_good / duration_s if duration_s > 0 else 0.0,
        )
