"""The metrics of each executor: those that are there now, under their addresses.

Every reading goes through the members that the fleet has at that moment, so an executor that left
is not on the page any more, and one that comes again begins at zero.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler_service.executors.load import FleetLoad
from scheduler_service.executors.member import Member
from scheduler_service.scheduler import Scheduler
from scheduler_service.telemetry.metrics import buckets
from scheduler_service.telemetry.metrics.distribution import histogram_family
from scheduler_service.telemetry.metrics.link_counts import LinkCounts
from scheduler_service.telemetry.metrics.state import CacheConfig, Family, ReadFamily, Readings

PREFIX = "nanovllm_"
#: The executor of sequences that wait while no executor takes any. No address looks like it.
NO_EXECUTOR = "none"

_Read: TypeAlias = Callable[[Member], float]

_NOTHING_COUNTED = LinkCounts()


class PerExecutorMetrics:
    """Defines the metrics and keeps what the links count."""

    def __init__(self, registry: CollectorRegistry, load: FleetLoad, model_name: str) -> None:
        self._registry = registry
        self._load = load
        self._model_name = model_name
        self._links: dict[str, LinkCounts] = {}
        #: Those that make sense as one number, summed over the executors, by name.
        self.sums: dict[str, Collector] = {}
        self._define_sessions()
        self._define_sequences()
        self._define_cache()

    def join(self, address: str) -> LinkCounts:
        """A link to an executor begins; returns where it counts."""
        counts = self._links[address] = LinkCounts()
        return counts

    def leave(self, address: str) -> None:
        """The link to an executor has ended."""
        self._links.pop(address, None)

    def _define_sessions(self) -> None:
        self._gauge(
            "executor_connected",
            "1 while a session with the executor is open, else 0.",
            lambda member: member.is_connected,
        )
        self._gauge(
            "executor_draining",
            "1 while the executor is drained: it gets no new sequences. Else 0.",
            lambda member: member.is_draining,
        )
        self._counter(
            "executor_restarts",
            "Sessions with the executor after the first.",
            lambda member: max(0, member.num_sessions - 1),
        )
        self._by_label(
            CounterMetricFamily,
            "executor_sessions_ended",
            "Sessions that ended, by reason; refused: the executor was there, but opened none.",
            "reason",
            lambda member: {
                reason.value: count for reason, count in self._link(member).sessions_ended.items()
            },
        )
        self._counter(
            "plans",
            "Plans handed to the executor's stream.",
            lambda member: self._link(member).num_plans,
        )
        self._registry.register(_RoundTrips(self._load, self._model_name, self._link))

    def _define_sequences(self) -> None:
        load = self._load
        self._gauge(
            "num_requests_running",
            "Sequences with KV blocks.",
            lambda member: member.scheduler.num_running,
            lambda: load.num_running,
        )
        self._waiting(
            "num_requests_waiting",
            "Sequences that wait; executor none: while no executor takes any.",
            lambda scheduler: scheduler.num_waiting,
            lambda: load.num_waiting,
        )
        self._waiting(
            "num_queued_tokens",
            "Prompt tokens of the sequences that wait.",
            lambda scheduler: scheduler.num_waiting_prompt_tokens,
            lambda: load.num_waiting_prompt_tokens,
        )
        self._gauge(
            "executor_slots",
            "Sequences that the executor can run at once; 0 while it is not connected.",
            lambda member: capacity.max_num_seqs if (capacity := member.scheduler.capacity) else 0,
        )
        self._counter(
            "requests_routed",
            "Sequences sent to the executor, new ones and those that others had before.",
            lambda member: member.num_routed,
        )
        self._counter(
            "num_preemptions",
            "Sequences that lost their blocks to others.",
            lambda member: member.scheduler.stats.num_preemptions,
            lambda: load.stats.num_preemptions,
        )
        self._counter(
            "recomputed_tokens",
            "Tokens computed again after a preemption or the loss of an executor.",
            lambda member: member.scheduler.stats.recomputed_tokens,
        )

    def _define_cache(self) -> None:
        load = self._load
        self._gauge(
            "kv_cache_usage_ratio",
            "Share of the KV blocks that sequences own.",
            lambda member: member.scheduler.kv_usage_ratio,
            lambda: load.kv_usage_ratio,
        )
        self._by_label(
            GaugeMetricFamily,
            "scheduler_kv_blocks",
            "KV blocks by state: free, cached (a prefix that nobody owns) or owned by sequences; "
            "all zero while the executor is not connected.",
            "state",
            _kv_blocks,
        )
        self._counter(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            lambda member: member.scheduler.stats.prefix_queried_tokens,
            lambda: load.stats.prefix_queried_tokens,
        )
        self._counter(
            "prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            lambda member: member.scheduler.stats.prefix_hit_tokens,
            lambda: load.stats.prefix_hit_tokens,
        )
        self._registry.register(
            CacheConfig(
                load,
                f"{PREFIX}cache_config_info",
                "KV cache and limits of a connected executor as labels; the value is 1.",
                {"model_name": self._model_name},
                executor_label="executor",
            )
        )

    def _link(self, member: Member) -> LinkCounts:
        return self._links.get(member.address, _NOTHING_COUNTED)

    def _gauge(
        self, name: str, documentation: str, read: _Read, total: Callable[[], float] | None = None
    ) -> None:
        self._define(GaugeMetricFamily, name, documentation, read, total)

    def _counter(
        self, name: str, documentation: str, read: _Read, total: Callable[[], float] | None = None
    ) -> None:
        self._define(CounterMetricFamily, name, documentation, read, total)

    def _waiting(
        self,
        name: str,
        documentation: str,
        read: Callable[[Scheduler], float],
        total: Callable[[], float],
    ) -> None:
        """A gauge of what waits, at the executors and for any of them."""
        self._define(
            GaugeMetricFamily,
            name,
            documentation,
            lambda member: read(member.scheduler),
            total,
            lambda: [((NO_EXECUTOR,), read(self._load.lobby))],
        )

    def _define(
        self,
        family: Family,
        name: str,
        documentation: str,
        read: _Read,
        total: Callable[[], float] | None,
        read_others: Callable[[], Readings] = list,
    ) -> None:
        def readings() -> Readings:
            own = [((member.address,), read(member)) for member in self._load.members]
            return [*own, *read_others()]

        self._register(family, name, documentation, ["executor"], readings)
        if total is not None:
            self.sums[name] = ReadFamily(
                family,
                f"{PREFIX}{name}",
                documentation,
                self._model_name,
                [],
                lambda: [((), total())],
            )

    def _by_label(
        self,
        family: Family,
        name: str,
        documentation: str,
        label: str,
        read: Callable[[Member], Mapping[str, float]],
    ) -> None:
        def readings() -> Readings:
            return [
                ((member.address, value), count)
                for member in self._load.members
                for value, count in read(member).items()
            ]

        self._register(family, name, documentation, ["executor", label], readings)

    def _register(
        self,
        family: Family,
        name: str,
        documentation: str,
        labels: list[str],
        read: Callable[[], Readings],
    ) -> None:
        self._registry.register(
            ReadFamily(family, f"{PREFIX}{name}", documentation, self._model_name, labels, read)
        )


class _RoundTrips(Collector):
    """A histogram for each executor."""

    def __init__(
        self, load: FleetLoad, model_name: str, link: Callable[[Member], LinkCounts]
    ) -> None:
        self._load = load
        self._model_name = model_name
        self._link = link

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        yield histogram_family(
            f"{PREFIX}executor_round_trip_seconds",
            "From handing a plan to the stream to the first result that acknowledges it: the "
            "stream both ways and the wait for the iteration in flight.",
            ["model_name", "executor"],
            buckets.LATENCY_S,
            [
                ((self._model_name, member.address), self._link(member).round_trip)
                for member in self._load.members
            ],
        )


def _kv_blocks(member: Member) -> Mapping[str, float]:
    blocks = member.scheduler.blocks
    if blocks is None:
        return {"free": 0, "cached": 0, "owned": 0}
    free, cached = blocks.num_free, blocks.num_cached
    # What is left, rather than a third reading, so that the states always add up.
    return {"free": free, "cached": cached, "owned": blocks.num_blocks - free - cached}
