"""The metrics of one scheduler process; meanings as in vLLM so that dashboards carry over."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import Counter, Gauge
from prometheus_client.registry import Collector

from nanovllm.service_metrics import new_registry
from scheduler_service.errors import RequestError
from scheduler_service.executors.load import FleetLoad
from scheduler_service.link.session_end import SessionEnd
from scheduler_service.sequence import FinishReason
from scheduler_service.telemetry.metrics import buckets
from scheduler_service.telemetry.metrics.distribution import Distribution, HistogramView
from scheduler_service.telemetry.metrics.state import CacheConfig, KvBlocks, ReadCounter

PREFIX = "nanovllm_"


class SchedulerMetrics:
    """All metrics of one scheduler process, in a registry of their own.

    What happens once per token goes into a `Distribution`, which costs no lock; what happens less
    often goes into the library's own classes; what the scheduler counts anyway is read from it.
    """

    def __init__(self, load: FleetLoad, model_name: str) -> None:
        self.registry = new_registry(model_name)
        self.load = load
        self.model_name = model_name
        #: Histograms by name, for those who show them under other names.
        self.distributions: dict[str, Distribution] = {}
        #: Gauges and counters likewise, names without `_total`.
        self.counts: dict[str, Collector] = {}
        self._define_request_times()
        self._define_request_sizes()
        self._define_counters()
        self._define_executor()
        self._define_state(load)

    def _define_request_times(self) -> None:
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds",
            "From the arrival of a request, before it is tokenized, to the first token.",
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds",
            "Time between tokens of a sequence; tokens that arrive together share it equally.",
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From the arrival of a request to its end."
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "From entering the queue to the first admission."
        )
        self.request_prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the first admission to the first token."
        )
        self.request_decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the last."
        )
        self.request_inference_time = self._histogram(
            "request_inference_time_seconds", "From the first admission to the last token."
        )
        self.request_time_per_output_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Mean time between the tokens of a sequence; 0 with a single token.",
        )

    def _define_request_sizes(self) -> None:
        for_tokens = buckets.TOKENS
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a sequence.", for_tokens
        )
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens of a sequence.", for_tokens
        )
        self.request_max_num_generation_tokens = self._histogram(
            "request_max_num_generation_tokens",
            "Generated tokens of a request's longest sequence.",
            for_tokens,
        )
        self.request_params_n = self._histogram(
            "request_params_n", "Completions that a request asked for.", buckets.COMPLETIONS
        )
        self.request_params_max_tokens = self._histogram(
            "request_params_max_tokens",
            "Most tokens that a request asked for, where it gave a limit.",
            for_tokens,
        )
        self.iteration_tokens = self._histogram(
            "iteration_tokens", "Tokens computed in one iteration.", for_tokens
        )

    def _define_counters(self) -> None:
        self.prompt_tokens = self._counter(
            "prompt_tokens",
            "Prompt tokens, cached ones included, of sequences that got their first token.",
        )
        self.generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self.requests = self._counters_by(
            "requests",
            "Ended sequences by reason.",
            "finished_reason",
            [reason.value for reason in FinishReason],
        )
        self.rejections = self._counters_by(
            "admission_rejections",
            "Requests refused before they were queued.",
            "reason",
            sorted(_error_labels(RequestError)),
        )

    def _define_executor(self) -> None:
        self.plans = self._counter("plans", "Plans handed to the executor's stream.")
        self.executor_round_trip = self._histogram(
            "executor_round_trip_seconds",
            "From handing a plan to the stream to the first result that acknowledges it: the "
            "stream both ways and the wait for the iteration in flight.",
        )
        self.executor_restarts = self._counter(
            "executor_restarts", "Sessions with an executor after the first."
        )
        self.sessions_ended = self._counters_by(
            "executor_sessions_ended",
            "Sessions that ended, by reason; refused: the executor was there, but opened none.",
            "reason",
            [reason.value for reason in SessionEnd],
        )
        self.event_loop_lag = self._histogram(
            "event_loop_lag_seconds",
            "Delay of the event loop, sampled a few times a second: what everything waits for.",
        )

    def _define_state(self, load: FleetLoad) -> None:
        self._gauge("num_requests_running", "Sequences with KV blocks.", lambda: load.num_running)
        self._gauge("num_requests_waiting", "Sequences that wait.", lambda: load.num_waiting)
        self._gauge(
            "num_queued_tokens",
            "Prompt tokens of the sequences that wait.",
            lambda: load.num_waiting_prompt_tokens,
        )
        self._gauge(
            "kv_cache_usage_ratio",
            "Share of the KV blocks that sequences own.",
            lambda: load.kv_usage_ratio,
        )
        self._gauge(
            "executor_connected",
            "1 while a session with an executor is open, else 0.",
            lambda: load.is_connected,
        )
        self._read_counter(
            "num_preemptions",
            "Sequences that lost their blocks to others.",
            lambda: load.stats.num_preemptions,
        )
        self._read_counter(
            "prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache.",
            lambda: load.stats.prefix_queried_tokens,
        )
        self._read_counter(
            "prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            lambda: load.stats.prefix_hit_tokens,
        )
        self._read_counter(
            "recomputed_tokens",
            "Tokens computed again after a preemption or the loss of an executor.",
            lambda: load.stats.recomputed_tokens,
        )
        self.registry.register(KvBlocks(load, self.model_name))
        self.registry.register(
            CacheConfig(
                load,
                "nanovllm_cache_config_info",
                "KV cache and limits of the connected executor as labels; the value is 1.",
                {"model_name": self.model_name},
            )
        )

    def count_finished(self, reason: FinishReason) -> None:
        """Counts an ended sequence."""
        self.requests.labels(self.model_name, reason.value).inc()

    def count_rejection(self, reason: str) -> None:
        """Counts a refused request."""
        self.rejections.labels(self.model_name, reason).inc()

    def count_session_end(self, reason: SessionEnd) -> None:
        """Counts an ended session with an executor."""
        self.sessions_ended.labels(self.model_name, reason.value).inc()

    def _histogram(
        self, name: str, documentation: str, bounds: Sequence[float] = buckets.LATENCY_S
    ) -> Distribution:
        distribution = self.distributions[name] = Distribution()
        labels = {"model_name": self.model_name}
        self.registry.register(
            HistogramView(distribution, f"{PREFIX}{name}", documentation, labels, bounds)
        )
        return distribution

    def _counter(self, name: str, documentation: str) -> Counter:
        counter = self._counters_by(name, documentation)
        return counter.labels(self.model_name)

    def _counters_by(
        self, name: str, documentation: str, label: str | None = None, values: Iterable[str] = ()
    ) -> Counter:
        """A counter per label value; those that are known start at 0, so that rates see the 1."""
        labels = ["model_name", label] if label else ["model_name"]
        counter = Counter(f"{PREFIX}{name}", documentation, labels, registry=self.registry)
        for value in values:
            counter.labels(self.model_name, value)
        self.counts[name] = counter
        return counter

    def _read_counter(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        counter = ReadCounter(f"{PREFIX}{name}", documentation, self.model_name, read)
        self.registry.register(counter)
        self.counts[name] = counter

    def _gauge(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        gauge = Gauge(f"{PREFIX}{name}", documentation, ["model_name"], registry=self.registry)
        gauge.labels(self.model_name).set_function(read)
        self.counts[name] = gauge


def _error_labels(error: type[RequestError]) -> set[str]:
    return {error.label}.union(*map(_error_labels, error.__subclasses__()))
