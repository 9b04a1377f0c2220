"""Histograms that take many equal observations at once and can be exported more than once."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Distribution:
    """Counts observations between bounds; bounds are inclusive upper ones.

    Written by one thread and read by that of the metrics server without a lock: a reading may miss
    the observations of the same moment, but its buckets always add up.
    """

    def __init__(self) -> None:
        self._bounds: list[float] = []
        self._counts = [0]
        self._sum = 0.0

    def refine(self, bounds: Sequence[float]) -> None:
        """Adds bounds. Raises RuntimeError after the first observation."""
        if any(self._counts):
            raise RuntimeError("bounds of a distribution can only be added before it is used")
        self._bounds = sorted({*self._bounds, *bounds})
        self._counts = [0] * (len(self._bounds) + 1)

    def observe(self, value: float, count: int = 1) -> None:
        """Adds `count` observations of `value`."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def sum(self) -> float:
        """The sum of all observed values."""
        return self._sum

    def cumulative(self, bounds: Sequence[float]) -> list[int]:
        """Observations up to each bound, and all of them last.

        Raises ValueError if a bound was never added.
        """
        up_to = list(accumulate(self._counts))
        position = {bound: index for index, bound in enumerate(self._bounds)}
        missing = [bound for bound in bounds if bound not in position]
        if missing:
            raise ValueError(f"the distribution is not counted at {missing}; call refine first")
        return [*(up_to[position[bound]] for bound in bounds), up_to[-1]]


class HistogramView(Collector):
    """A distribution as a Prometheus histogram with some of its bounds."""

    def __init__(
        self,
        distribution: Distribution,
        name: str,
        documentation: str,
        labels: Mapping[str, str],
        bounds: Sequence[float],
    ) -> None:
        """Adds the bounds to the distribution. Raises RuntimeError if that was used already."""
        distribution.refine(bounds)
        self._distribution = distribution
        self._name = name
        self._documentation = documentation
        self._labels = dict(labels)
        self._bounds = tuple(bounds)

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        yield histogram_family(
            self._name,
            self._documentation,
            list(self._labels),
            self._bounds,
            [(list(self._labels.values()), self._distribution)],
        )


def histogram_family(
    name: str,
    documentation: str,
    labels: Sequence[str],
    bounds: Sequence[float],
    distributions: Iterable[tuple[Sequence[str], Distribution]],
) -> HistogramMetricFamily:
    """Distributions by the values of the labels in exposition form, counted at `bounds`.

    Raises ValueError if a bound was never added to one of them.
    """
    family = HistogramMetricFamily(name, documentation, labels=labels)
    bound_labels = [*map(floatToGoString, bounds), "+Inf"]
    for values, distribution in distributions:
        counts = distribution.cumulative(bounds)
        family.add_metric(values, list(zip(bound_labels, counts, strict=True)), distribution.sum)
    return family
