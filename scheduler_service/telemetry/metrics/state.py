"""Metrics that are read from the scheduler when somebody asks for them.

The metrics server's thread reads while the event loop writes. Every value is one attribute that is
replaced as a whole, and objects that may go away are fetched once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler_service.executors.load import FleetLoad
from scheduler_service.scheduler import ExecutorCapacity

Family: TypeAlias = type[GaugeMetricFamily] | type[CounterMetricFamily]
#: Values of a metric by those of its labels, without model_name.
Readings: TypeAlias = Iterable[tuple[Sequence[str], float]]


class ReadFamily(Collector):
    """A gauge or a counter whose values are kept elsewhere."""

    def __init__(
        self,
        family: Family,
        name: str,
        documentation: str,
        model_name: str,
        labels: Sequence[str],
        read: Callable[[], Readings],
    ) -> None:
        self._family = family
        self._name = name
        self._documentation = documentation
        self._model_name = model_name
        self._labels = ["model_name", *labels]
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        family = self._family(self._name, self._documentation, labels=self._labels)
        for values, value in self._read():
            family.add_metric([self._model_name, *values], value)
        yield family


class CacheConfig(Collector):
    """The executors' KV caches as labels; nothing while no executor is connected.

    Without a label for the executor those of equal sizes are one sample.
    """

    def __init__(
        self,
        load: FleetLoad,
        name: str,
        documentation: str,
        labels: dict[str, str],
        num_blocks_label: str = "num_kv_blocks",
        executor_label: str | None = None,
    ) -> None:
        self._load = load
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._num_blocks_label = num_blocks_label
        self._executor_label = executor_label

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        family = GaugeMetricFamily(self._name, self._documentation)
        if self._executor_label is None:
            for capacity in dict.fromkeys(self._load.capacities):
                family.add_sample(self._name, self._sizes(capacity), 1)
        else:
            for member in self._load.members:
                if (of_member := member.scheduler.capacity) is not None:
                    labels = {self._executor_label: member.address, **self._sizes(of_member)}
                    family.add_sample(self._name, labels, 1)
        yield family

    def _sizes(self, capacity: ExecutorCapacity) -> dict[str, str]:
        return {
            **self._labels,
            "block_size": str(capacity.block_size),
            self._num_blocks_label: str(capacity.num_blocks),
            "enable_prefix_caching": str(self._load.policy.enable_prefix_caching),
            "max_num_seqs": str(capacity.max_num_seqs),
            "max_num_batched_tokens": str(capacity.max_num_batched_tokens),
            "max_model_len": str(capacity.max_model_len),
        }
