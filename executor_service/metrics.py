"""Prometheus metrics of the executor."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_STEP_BUCKETS_S = (
    *(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0),
)
_DELAY_BUCKETS_S = (0.00005, 0.0001, *_STEP_BUCKETS_S)


class ExecutorMetrics:
    """All metrics of one executor process, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._busy = self._counter("gpu_busy_seconds", "Time the device spent on iterations.")
        self._idle = self._counter(
            "gpu_idle_seconds", "Time the device was idle although a slot could have run."
        )
        self._step_duration = Histogram(
            "nanovllm_step_duration_seconds",
            "Time of one iteration by kind: prefill, decode or mixed.",
            ["model_name", "kind"],
            buckets=_STEP_BUCKETS_S,
            registry=self.registry,
        )
        self.plan_queue_delay = Histogram(
            "nanovllm_plan_queue_delay_seconds",
            "From the arrival of a plan to its application.",
            ["model_name"],
            buckets=_DELAY_BUCKETS_S,
            registry=self.registry,
        ).labels(model_name)
        self._kv_blocks = Gauge(
            "nanovllm_kv_blocks",
            "KV blocks that plans may use.",
            ["model_name"],
            registry=self.registry,
        ).labels(model_name)
        self._graph_replays = self._counter(
            "cuda_graph_replays", "Iterations that were one replay of a CUDA graph."
        )
        self._sessions = self._counter("sessions", "Sessions that schedulers opened.")

    def set_kv_blocks(self, count: int) -> None:
        """Says how large the cache is."""
        self._kv_blocks.set(count)

    def count_session(self) -> None:
        """Counts an opened session."""
        self._sessions.inc()

    def record_step(self, *, kind: str, busy_s: float, idle_s: float, from_graph: bool) -> None:
        """Records one iteration."""
        self._busy.inc(busy_s)
        self._idle.inc(idle_s)
        if from_graph:
            self._graph_replays.inc()
        self._step_duration.labels(self._model_name, kind).observe(busy_s)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(
            f"nanovllm_{name}", documentation, ["model_name"], registry=self.registry
        ).labels(self._model_name)
