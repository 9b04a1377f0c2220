"""Metrics that are read from the scheduler when somebody asks for them.

The metrics server's thread reads while the event loop writes. Every value is one attribute that is
replaced as a whole, and objects that may go away are fetched once.
"""

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler_service.executors.load import FleetLoad


class ReadCounter(Collector):
    """A counter whose value is kept elsewhere."""

    def __init__(
        self, name: str, documentation: str, model_name: str, read: Callable[[], float]
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._model_name = model_name
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        family = CounterMetricFamily(self._name, self._documentation, labels=["model_name"])
        family.add_metric([self._model_name], self._read())
        yield family


class KvBlocks(Collector):
    """KV blocks by state; all zero while no executor is connected."""

    def __init__(self, load: FleetLoad, model_name: str) -> None:
        self._load = load
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        num_free = num_cached = num_owned = 0
        for blocks in self._load.blocks:
            free, cached = blocks.num_free, blocks.num_cached
            num_free += free
            num_cached += cached
            # What is left, rather than a third reading, so that the states always add up.
            num_owned += blocks.num_blocks - free - cached
        family = GaugeMetricFamily(
            "nanovllm_scheduler_kv_blocks",
            "KV blocks by state: free, cached (a prefix that nobody owns) or owned by sequences.",
            labels=["model_name", "state"],
        )
        for state, count in (("free", num_free), ("cached", num_cached), ("owned", num_owned)):
            family.add_metric([self._model_name, state], count)
        yield family


class CacheConfig(Collector):
    """The executors' KV caches as labels; nothing while no executor is connected."""

    def __init__(
        self,
        load: FleetLoad,
        name: str,
        documentation: str,
        labels: dict[str, str],
        num_blocks_label: str = "num_kv_blocks",
    ) -> None:
        self._load = load
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._num_blocks_label = num_blocks_label

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        family = GaugeMetricFamily(self._name, self._documentation)
        # Executors of equal sizes are one sample.
        for capacity in dict.fromkeys(self._load.capacities):
            labels = {
                **self._labels,
                "block_size": str(capacity.block_size),
                self._num_blocks_label: str(capacity.num_blocks),
                "enable_prefix_caching": str(self._load.policy.enable_prefix_caching),
                "max_num_seqs": str(capacity.max_num_seqs),
                "max_num_batched_tokens": str(capacity.max_num_batched_tokens),
                "max_model_len": str(capacity.max_model_len),
            }
            family.add_sample(self._name, labels, 1)
        yield family
