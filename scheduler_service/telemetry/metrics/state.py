"""Metrics that are read from the scheduler when somebody asks for them.

The metrics server's thread reads while the event loop writes. Every value is one attribute that is
replaced as a whole, and objects that may go away are fetched once.
"""

from collections.abc import Callable, Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler_service.scheduler import Scheduler


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

    def __init__(self, scheduler: Scheduler, model_name: str) -> None:
        self._scheduler = scheduler
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        blocks = self._scheduler.blocks
        num_free = blocks.num_free if blocks else 0
        num_cached = blocks.num_cached if blocks else 0
        # What is left, rather than a third reading, so that the states always add up.
        num_owned = blocks.num_blocks - num_free - num_cached if blocks else 0
        family = GaugeMetricFamily(
            "nanovllm_scheduler_kv_blocks",
            "KV blocks by state: free, cached (a prefix that nobody owns) or owned by sequences.",
            labels=["model_name", "state"],
        )
        for state, count in (("free", num_free), ("cached", num_cached), ("owned", num_owned)):
            family.add_metric([self._model_name, state], count)
        yield family


class CacheConfig(Collector):
    """The executor's KV cache as labels; nothing while no executor is connected."""

    def __init__(
        self,
        scheduler: Scheduler,
        name: str,
        documentation: str,
        labels: dict[str, str],
        num_blocks_label: str = "num_kv_blocks",
    ) -> None:
        self._scheduler = scheduler
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._num_blocks_label = num_blocks_label

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        family = GaugeMetricFamily(self._name, self._documentation)
        capacity = self._scheduler.capacity
        if capacity is not None:
            labels = {
                **self._labels,
                "block_size": str(capacity.block_size),
                self._num_blocks_label: str(capacity.num_blocks),
                "enable_prefix_caching": str(self._scheduler.policy.enable_prefix_caching),
                "max_num_seqs": str(capacity.max_num_seqs),
                "max_num_batched_tokens": str(capacity.max_num_batched_tokens),
                "max_model_len": str(capacity.max_model_len),
            }
            family.add_sample(self._name, labels, 1)
        yield family
