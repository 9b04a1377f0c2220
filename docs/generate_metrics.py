"""Writes docs/metrics.md from the metrics that the services define.

python -m docs.generate_metrics
"""

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from docs.tables import markdown_table
from executor_service.metrics import ExecutorMetrics
from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.load import FleetLoad
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy
from scheduler_service.telemetry.metrics import SchedulerMetrics, buckets, vllm
from scheduler_service.telemetry.metrics.executor_metrics import PREFIX

DOCUMENT = Path(__file__).with_name("metrics.md")

_TEXT = """\
# Metrics

Written by `make docs` from the definitions in the code.

The scheduler serves Prometheus metrics on port 9401, the executor on port 9402. Every metric has
the label `model_name`. No label has a value that comes from a request. Values of a label that are
known are there from the start, with 0, so that a rate sees the first event.

What belongs to one executor has the label `executor`, the address that the scheduler was given for
it. An executor that leaves takes its series along, and one that joins again begins at 0, so take
the rate of a counter before the sum over `executor`. Sequences that wait while no executor takes
any are shown at the executor `none`.

## Metrics of `scheduler_service`

{scheduler}

Times of a request are those of vLLM. Arrival is when the server has the call, before the prompt is
tokenized; the queue begins behind that. A preempted request stays in the phase where it was. A
sequence that was resumed counts with the tokens that were generated here. Latency buckets reach
from {smallest_ms:g} ms to {largest_s:g} s.

## Metrics of `executor_service`

{executor}

Times of the device are measured by events on a GPU, and by the clock on a CPU.

## Metrics of both

{both}

## Names of vLLM

With `--metrics-compat vllm` the scheduler serves the following as well, with the labels
`model_name` and `engine` (always `0`) and with vLLM's buckets, so that dashboards, autoscalers and
gateways made for vLLM work. They show the same counts and observations, all executors together;
nothing is recorded twice.

{vllm}

Where they differ from vLLM's own:

- `vllm:iteration_tokens_total` has the tokens that an iteration computed. vLLM counts a whole
  prompt with the iteration that ends its prefill, cached tokens included.
- `vllm:inter_token_latency_seconds` has one observation per token. Tokens that reach the scheduler
  in one message share the time since the message before.
- `vllm:request_params_max_tokens` leaves out requests without a limit of their own; vLLM's server
  fills one in.
- `vllm:cache_config_info` has the labels that gateways read, `block_size` and `num_gpu_blocks`, and
  the executor's limits, but not the other settings of vLLM's cache. Executors of different sizes
  have a series each.
- What this engine does not have has no metrics: LoRA, speculative decoding, multimodal input. Names
  that vLLM gave up, such as `vllm:gpu_cache_usage_perc`, are not served either.
"""


def document() -> str:
    """The text of docs/metrics.md."""
    scheduler, executor = _scheduler(), _executor()
    own = {f.name for f in scheduler if not f.name.startswith(vllm.VLLM_PREFIX)}
    both = own & {family.name for family in executor}
    return _TEXT.format(
        scheduler=_table(f for f in scheduler if f.name in own - both),
        executor=_table(f for f in executor if f.name not in both),
        both=_table(f for f in executor if f.name in both),
        vllm=_vllm_table(f for f in scheduler if f.name not in own),
        smallest_ms=1000 * buckets.LATENCY_S[0],
        largest_s=buckets.LATENCY_S[-1],
    )


def _scheduler() -> list[Metric]:
    """Of a scheduler that has an executor, since some metrics describe it."""
    fleet = Fleet(SchedulerPolicy())
    scheduler = fleet.join("127.0.0.1:50052").scheduler
    metrics = SchedulerMetrics(FleetLoad(fleet), "model")
    vllm.export_vllm_names(metrics, 4096)
    scheduler.attach(ExecutorCapacity(64, 16, 8, 512, 4096))
    return _families(metrics.registry)


def _executor() -> list[Metric]:
    """Of an executor on a GPU that has started."""
    metrics = ExecutorMetrics("model")
    metrics.set_kv_blocks(64)
    metrics.set_start(model_load_s=1, startup_s=2)
    metrics.watch_gpu_memory(weight_bytes=1, kv_cache_bytes=1, read_reserved_bytes=lambda: 2)
    return _families(metrics.registry)


def _families(registry: CollectorRegistry) -> list[Metric]:
    return sorted(registry.collect(), key=lambda family: family.name)


def _table(families: Iterable[Metric]) -> str:
    rows = [
        (f"`{name(family)}`", family.type, _labels(family), unit(family), family.documentation)
        for family in families
    ]
    return markdown_table(("name", "type", "labels", "unit", "meaning"), rows)


def _vllm_table(families: Iterable[Metric]) -> str:
    names = {**vllm.GAUGES, **vllm.COUNTERS, **vllm.HISTOGRAMS}
    own = {theirs: ours for ours, theirs in names.items()}
    rows = []
    for family in families:
        short = family.name.removeprefix(vllm.VLLM_PREFIX)
        suffix = "_total" if family.type == "counter" else ""
        ours = f"`{PREFIX}{own.get(short, short)}{suffix}`"
        rows.append((f"`{name(family)}`", family.type, _labels(family, {"engine"}), ours))
    return markdown_table(("name", "type", "further labels", "the same as"), rows)


def name(family: Metric) -> str:
    """The name as it stands on the page."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def unit(family: Metric) -> str:
    """The unit that the name promises; empty for plain counts and for labels with the value 1."""
    for suffix in ("seconds", "bytes", "tokens"):
        if family.name.endswith(suffix):
            return suffix
    return "0 to 1" if family.name.endswith("_ratio") else ""


def _labels(family: Metric, known: Iterable[str] = ()) -> str:
    """Labels and, unless they describe something that differs everywhere, their values."""
    values: dict[str, dict[str, None]] = {}
    for sample in family.samples:
        for label, value in sample.labels.items():
            if label not in {"model_name", "le", *known}:
                values.setdefault(label, {})[value] = None
    if family.name.endswith("_info"):
        return ", ".join(f"`{label}`" for label in sorted(values))
    return "; ".join(
        f"`{label}`" if label == "executor" else f"`{label}`: {', '.join(values[label])}"
        for label in sorted(values)
    )


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
