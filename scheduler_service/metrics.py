"""Prometheus metrics of the scheduler; meanings as in vLLM so that dashboards carry over."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler_service.scheduler import Scheduler

_LATENCY_BUCKETS_S = (
    *(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
)
_TOKEN_BUCKETS = tuple(float(2**power) for power in range(18))


class TokenLatencyHistogram(Collector):
    """A histogram that takes many equal observations at once.

    One observation per generated token through the library's own class would cost a noticeable
    share of a core at tens of thousands of tokens a second.
    """

    def __init__(self, name: str, documentation: str, model_name: str) -> None:
        self._name = name
        self._documentation = documentation
        self._model_name = model_name
        self._counts = [0] * (len(_LATENCY_BUCKETS_S) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int) -> None:
        """Adds `count` observations of `value`."""
        self._counts[bisect_left(_LATENCY_BUCKETS_S, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        """The metric in exposition form."""
        buckets, total = [], 0
        for bound, count in zip([*map(str, _LATENCY_BUCKETS_S), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(self._name, self._documentation, labels=["model_name"])
        family.add_metric([self._model_name], buckets, self._sum)
        yield family


class _SchedulerCounters(Collector):
    """Reads the pure scheduler's counters when they are asked for."""

    def __init__(self, scheduler: Scheduler, model_name: str) -> None:
        self._scheduler = scheduler
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        """The metrics in exposition form."""
        stats = self._scheduler.stats
        for name, documentation, value in (
            (
                "num_preemptions",
                "Sequences that lost their blocks to others.",
                stats.num_preemptions,
            ),
            ("recomputed_tokens", "Tokens computed again after a loss.", stats.recomputed_tokens),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                stats.prefix_queried_tokens,
            ),
            (
                "prefix_cache_hits",
                "Prompt tokens found in the prefix cache.",
                stats.prefix_hit_tokens,
            ),
        ):
            family = CounterMetricFamily(f"nanovllm_{name}", documentation, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family


class SchedulerMetrics:
    """All metrics of one scheduler process, in a registry of their own."""

    def __init__(self, scheduler: Scheduler, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _LATENCY_BUCKETS_S
        )
        self.inter_token_latency = TokenLatencyHistogram(
            "nanovllm_inter_token_latency_seconds", "Time between tokens of a sequence.", model_name
        )
        self.registry.register(self.inter_token_latency)
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY_BUCKETS_S
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival to admission.", _LATENCY_BUCKETS_S
        )
        self.request_prefill_time = self._histogram(
            "request_prefill_time_seconds", "From admission to the first token.", _LATENCY_BUCKETS_S
        )
        self.request_decode_time = self._histogram(
            "request_decode_time_seconds",
            "From the first token to the last.",
            _LATENCY_BUCKETS_S,
        )
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a sequence.", _TOKEN_BUCKETS
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a sequence.", _TOKEN_BUCKETS
        )
        self.iteration_tokens = self._histogram(
            "iteration_tokens", "Tokens computed in one iteration.", _TOKEN_BUCKETS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted sequences.")
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.executor_restarts = self._counter(
            "executor_restarts", "Sessions with an executor after the first."
        )
        self._requests = self._counter_family(
            "requests", "Ended sequences by reason.", "finished_reason"
        )
        self._rejections = self._counter_family(
            "admission_rejections", "Requests refused before they were queued.", "reason"
        )
        self._gauge(
            "num_requests_running", "Sequences with KV blocks.", lambda: scheduler.num_running
        )
        self._gauge("num_requests_waiting", "Sequences that wait.", lambda: scheduler.num_waiting)
        self._gauge(
            "kv_cache_usage_ratio",
            "Share of the KV blocks that sequences own.",
            lambda: scheduler.kv_usage_ratio,
        )
        self.registry.register(_SchedulerCounters(scheduler, model_name))

    def count_finished(self, reason: str) -> None:
        """Counts an ended sequence."""
        self._requests.labels(self._model_name, reason).inc()

    def count_rejection(self, reason: str) -> None:
        """Counts a refused request."""
        self._rejections.labels(self._model_name, reason).inc()

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"nanovllm_{name}",
            documentation,
            ["model_name"],
            buckets=buckets,
            registry=self.registry,
        ).labels(self._model_name)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(
            f"nanovllm_{name}", documentation, ["model_name"], registry=self.registry
        ).labels(self._model_name)

    def _counter_family(self, name: str, documentation: str, label: str) -> Counter:
        return Counter(
            f"nanovllm_{name}", documentation, ["model_name", label], registry=self.registry
        )

    def _gauge(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        Gauge(f"nanovllm_{name}", documentation, ["model_name"], registry=self.registry).labels(
            self._model_name
        ).set_function(read)
