"""The scheduler's metrics under vLLM's names, labels and buckets (`--metrics-compat vllm`).

They show the same counts and distributions as our own metrics; nothing is recorded twice. Where
those are per executor, these are their sums. Names and buckets are those of PrometheusStatLogger in
vLLM's vllm/v1/metrics/loggers.py, version 0.11.
"""

from nanovllm.service_metrics import Relabelled
from scheduler_service.telemetry.metrics.distribution import HistogramView
from scheduler_service.telemetry.metrics.executor_metrics import PREFIX
from scheduler_service.telemetry.metrics.scheduler_metrics import SchedulerMetrics
from scheduler_service.telemetry.metrics.state import CacheConfig

VLLM_PREFIX = "vllm:"
# vLLM numbers the engines of one server; this server has one, whatever its executors.
_ENGINE = "0"

#: Our name and vLLM's, both without prefix.
GAUGES = {
    "num_requests_running": "num_requests_running",
    "num_requests_waiting": "num_requests_waiting",
    "kv_cache_usage_ratio": "kv_cache_usage_perc",
}
#: Likewise, and without `_total`.
COUNTERS = {
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "num_preemptions": "num_preemptions",
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "requests": "request_success",
}
#: Like the gauges.
HISTOGRAMS = {
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "request_time_per_output_token_seconds": "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds": "e2e_request_latency_seconds",
    "request_queue_time_seconds": "request_queue_time_seconds",
    "request_prefill_time_seconds": "request_prefill_time_seconds",
    "request_decode_time_seconds": "request_decode_time_seconds",
    "request_inference_time_seconds": "request_inference_time_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
    "request_max_num_generation_tokens": "request_max_num_generation_tokens",
    "request_params_n": "request_params_n",
    "request_params_max_tokens": "request_params_max_tokens",
    # Not a counter in spite of its name.
    "iteration_tokens": "iteration_tokens_total",
}
_OUTPUT_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_BOUNDS = {
    "time_to_first_token_seconds": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
        *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
    ),
    "inter_token_latency_seconds": _OUTPUT_TOKEN_S,
    "request_time_per_output_token_seconds": _OUTPUT_TOKEN_S,
    "e2e_request_latency_seconds": _REQUEST_S,
    "request_queue_time_seconds": _REQUEST_S,
    "request_prefill_time_seconds": _REQUEST_S,
    "request_decode_time_seconds": _REQUEST_S,
    "request_inference_time_seconds": _REQUEST_S,
    "request_params_n": (1.0, 2.0, 5.0, 10.0, 20.0),
    "iteration_tokens_total": (1.0, *(float(2**power) for power in range(3, 15))),
}


def export_vllm_names(metrics: SchedulerMetrics, max_model_len: int) -> None:
    """Adds vLLM's metrics to the registry; before anything is recorded.

    Args:
        metrics: Where the values come from.
        max_model_len: The model's longest sequence in tokens, where vLLM's token buckets end.
    """
    labels = {"model_name": metrics.model_name, "engine": _ENGINE}
    for names, suffix in ((GAUGES, ""), (COUNTERS, "_total")):
        for own, name in names.items():
            source, meaning = metrics.counts[own], _same_as(own + suffix)
            metrics.registry.register(Relabelled(source, labels, f"{VLLM_PREFIX}{name}", meaning))
    for own, name in HISTOGRAMS.items():
        metrics.registry.register(
            HistogramView(
                metrics.distributions[own],
                f"{VLLM_PREFIX}{name}",
                _same_as(own),
                labels,
                _BOUNDS.get(name) or one_two_five(max_model_len),
            )
        )
    metrics.registry.register(
        CacheConfig(
            metrics.load,
            f"{VLLM_PREFIX}cache_config_info",
            _same_as("cache_config_info"),
            labels,
            num_blocks_label="num_gpu_blocks",
        )
    )


def one_two_five(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 and so on, as far as `largest` reaches."""
    steps = (
        mantissa * 10**exponent for exponent in range(len(str(largest))) for mantissa in (1, 2, 5)
    )
    return tuple(float(step) for step in steps if step <= largest)


def _same_as(own: str) -> str:
    return f"The same as {PREFIX}{own}, for dashboards made for vLLM."
