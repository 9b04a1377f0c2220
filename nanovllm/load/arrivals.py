"""When requests of an open-loop run are due: arrival processes of a given mean rate."""

import random
from collections.abc import Callable
from enum import StrEnum
from itertools import accumulate

#: Shape of the gamma distribution of bursty gaps. Their coefficient of variation is
#: 1 / sqrt(shape): 2 here, 1 for a Poisson process.
DEFAULT_BURSTINESS = 0.25


class Arrivals(StrEnum):
    """How the gaps between arrivals are distributed."""

    #: Exponential gaps: independent users.
    POISSON = "poisson"
    #: Gamma-distributed gaps, as measured on services in "BurstGPT" (Wang et al., 2024,
    #: arXiv:2401.17644).
    BURSTY = "bursty"
    #: Equal gaps.
    UNIFORM = "uniform"


def arrival_times(
    kind: Arrivals,
    count: int,
    *,
    rate: float,
    seed: int,
    burstiness: float = DEFAULT_BURSTINESS,
) -> list[float]:
    """Draws when requests are due, in seconds, the first at 0.

    Args:
        kind: The arrival process.
        count: Number of arrivals.
        rate: Mean arrivals per second.
        seed: The same seed gives the same times.
        burstiness: Shape of the gamma distribution for bursty arrivals. 1 is a Poisson process,
            less is burstier, more is smoother.

    Raises:
        ValueError: `rate` or `burstiness` is not above 0.
    """
    if not rate > 0:
        raise ValueError(f"the rate must be above 0 requests per second, got {rate:g}")
    if not burstiness > 0:
        raise ValueError(f"the burstiness must be above 0, got {burstiness:g}")
    if count < 1:
        return []
    gap_s = _gaps(kind, rate, burstiness, random.Random(f"arrivals {seed}"))
    return list(accumulate((gap_s() for _ in range(count - 1)), initial=0.0))


def _gaps(
    kind: Arrivals, rate: float, burstiness: float, generator: random.Random
) -> Callable[[], float]:
    match kind:
        case Arrivals.POISSON:
            return lambda: generator.expovariate(rate)
        case Arrivals.BURSTY:
            # Shape times scale is the mean gap, whatever the shape.
            return lambda: generator.gammavariate(burstiness, 1.0 / (rate * burstiness))
        case Arrivals.UNIFORM:
            return lambda: 1.0 / rate
