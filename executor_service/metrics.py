"""Prometheus metrics of the executor."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from prometheus_client import Counter, Gauge, Histogram

from nanovllm.service_metrics import new_registry

_PREFIX = "nanovllm_"
_STEP_BUCKETS_S = (
    *(0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0),
)
_DELAY_BUCKETS_S = (0.00005, 0.0001, *_STEP_BUCKETS_S)
# Largest batch of each value of the batch label but the last.
_BATCH_BOUNDS = (1, 8, 64, 256)
_BATCHES = ("1", "2-8", "9-64", "65-256", ">256")


class StepKind(Enum):
    """What an iteration consisted of; values of the kind label."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One iteration, as the metrics see it."""

    kind: StepKind
    # Sequences that took part.
    num_sequences: int
    # Tokens that were computed.
    num_tokens: int
    # Time that the device worked, and that it had been idle before although a slot could have run.
    busy_s: float
    idle_s: float
    # Whether it was one replay of a CUDA graph.
    from_graph: bool


class ExecutorMetrics:
    """All metrics of one executor process, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = new_registry(model_name)
        self._model_name = model_name
        self._define_steps()
        self.plan_queue_delay = self._histogram(
            "plan_queue_delay_seconds", "From the arrival of a plan to its application."
        ).labels(model_name)
        self.results_queue_delay = self._histogram(
            "results_queue_delay_seconds",
            "From taking an iteration's results off the device to handing them to gRPC.",
        ).labels(model_name)
        self._sessions = self._counter("sessions", "Sessions that schedulers opened.")
        self._kv_blocks = self._gauge("kv_blocks", "KV blocks that plans may use.")
        self._slots_active = self._gauge("slots_active", "Slots that sequences occupy.")
        self._slots_active.labels(model_name)
        self._model_load = self._gauge(
            "model_load_seconds", "Time it took to read the weights onto the device."
        )
        self._startup = self._gauge(
            "startup_seconds", "From the start of the process until it could serve."
        )
        self._gpu_memory = self._gauge(
            "gpu_memory_bytes",
            "GPU memory by use: weights, kv_cache, or other (what else PyTorch has reserved).",
            "kind",
        )

    def _define_steps(self) -> None:
        self._busy = self._counter("gpu_busy_seconds", "Time the device spent on iterations.")
        self._idle = self._counter(
            "gpu_idle_seconds", "Time the device was idle although a slot could have run."
        )
        self._graph_replays = self._counter(
            "cuda_graph_replays", "Iterations that replayed CUDA graphs."
        )
        durations = Histogram(
            f"{_PREFIX}step_duration_seconds",
            "Time of one iteration by kind (prefill, decode or mixed) and number of sequences.",
            ["model_name", "kind", "batch"],
            buckets=_STEP_BUCKETS_S,
            registry=self.registry,
        )
        # All of them from the start: a rate would miss the first observation of a new one.
        self._step_durations = {
            (kind, batch): durations.labels(self._model_name, kind.value, batch)
            for kind in StepKind
            for batch in _BATCHES
        }
        tokens = Counter(
            f"{_PREFIX}step_tokens",
            "Tokens computed in iterations by kind (prefill, decode or mixed).",
            ["model_name", "kind"],
            registry=self.registry,
        )
        self._step_tokens = {kind: tokens.labels(self._model_name, kind.value) for kind in StepKind}

    def set_kv_blocks(self, count: int) -> None:
        """Says how large the cache is."""
        self._kv_blocks.labels(self._model_name).set(count)

    def set_start(self, *, model_load_s: float, startup_s: float) -> None:
        """Says how long it took to load the model, and to become ready in all."""
        self._model_load.labels(self._model_name).set(model_load_s)
        self._startup.labels(self._model_name).set(startup_s)

    def watch_slots(self, read: Callable[[], int]) -> None:
        """Reads the number of occupied slots from here; called on the metrics server's thread."""
        self._slots_active.labels(self._model_name).set_function(read)

    def watch_gpu_memory(
        self, *, weight_bytes: int, kv_cache_bytes: int, read_reserved_bytes: Callable[[], int]
    ) -> None:
        """Shows GPU memory. `read_reserved_bytes` says what PyTorch holds of it at the moment."""
        self._gpu_memory.labels(self._model_name, "weights").set(weight_bytes)
        self._gpu_memory.labels(self._model_name, "kv_cache").set(kv_cache_bytes)
        self._gpu_memory.labels(self._model_name, "other").set_function(
            lambda: max(0, read_reserved_bytes() - weight_bytes - kv_cache_bytes)
        )

    def count_session(self) -> None:
        """Counts an opened session."""
        self._sessions.inc()

    def record_step(self, step: StepRecord) -> None:
        """Records one iteration."""
        self._busy.inc(step.busy_s)
        self._idle.inc(step.idle_s)
        if step.from_graph:
            self._graph_replays.inc()
        batch = _BATCHES[bisect_left(_BATCH_BOUNDS, step.num_sequences)]
        self._step_durations[step.kind, batch].observe(step.busy_s)
        self._step_tokens[step.kind].inc(step.num_tokens)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(
            f"{_PREFIX}{name}", documentation, ["model_name"], registry=self.registry
        ).labels(self._model_name)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(
            f"{_PREFIX}{name}", documentation, ["model_name", *labels], registry=self.registry
        )

    def _histogram(self, name: str, documentation: str) -> Histogram:
        return Histogram(
            f"{_PREFIX}{name}",
            documentation,
            ["model_name"],
            buckets=_DELAY_BUCKETS_S,
            registry=self.registry,
        )
