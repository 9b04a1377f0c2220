"""The metrics of one scheduler process; meanings as in vLLM so that dashboards carry over."""

from collections.abc import Iterable, Sequence

from prometheus_client import Counter
from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector

from nanovllm.service_metrics import new_registry
from scheduler_service.errors import RequestError
from scheduler_service.executors.load import FleetLoad
from scheduler_service.sequence import FinishReason
from scheduler_service.telemetry.metrics import buckets
from scheduler_service.telemetry.metrics.distribution import Distribution, HistogramView
from scheduler_service.telemetry.metrics.executor_metrics import PREFIX, PerExecutorMetrics
from scheduler_service.telemetry.metrics.state import ReadFamily


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
        #: Gauges and counters likewise, names without `_total`, sums over the executors.
        self.counts: dict[str, Collector] = {}
        self._define_request_times()
        self._define_request_sizes()
        self._define_counters()
        self.event_loop_lag = self._histogram(
            "event_loop_lag_seconds",
            "Delay of the event loop, sampled a few times a second: what everything waits for.",
        )
        self.executors = PerExecutorMetrics(self.registry, load, model_name)
        self.counts.update(self.executors.sums)

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
        self.registry.register(
            ReadFamily(
                CounterMetricFamily,
                f"{PREFIX}requests_moved",
                "Sequences taken from an executor, by reason: it was lost, drained or removed, or "
                "they waited there and another one had less to do.",
                self.model_name,
                ["reason"],
                lambda: [((why.value,), count) for why, count in self.load.num_moved.items()],
            )
        )

    def count_finished(self, reason: FinishReason) -> None:
        """Counts an ended sequence."""
        self.requests.labels(self.model_name, reason.value).inc()

    def count_rejection(self, reason: str) -> None:
        """Counts a refused request."""
        self.rejections.labels(self.model_name, reason).inc()

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


def _error_labels(error: type[RequestError]) -> set[str]:
    return {error.label}.union(*map(_error_labels, error.__subclasses__()))
