"""Dashboard "serving": what users of the models experience, and why."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana import promql, stats
from deploy.grafana.frame import Row, build_dashboard
from deploy.grafana.panels import Limits, Line, Panel, density, graph, note, percentiles, value
from deploy.grafana.units import (
    PER_S,
    REQUESTS,
    REQUESTS_PER_S,
    SECONDS,
    SHARE,
    TOKENS,
    TOKENS_PER_S,
)

_TTFT = "nanovllm_time_to_first_token_seconds"
_ITL = "nanovllm_inter_token_latency_seconds"
_E2E = "nanovllm_e2e_request_latency_seconds"
_QUEUE_TIME = "nanovllm_request_queue_time_seconds"
_HALF = 12


def serving() -> Dashboard:
    """Builds the dashboard."""
    return build_dashboard(
        "nanovllm-serving",
        "nanovllm: serving",
        "Load, latency, queue and KV cache as clients experience them.",
        [
            Row("Does anyone wait, why, and what does the GPU do?", _answer()),
            Row("Load", _load()),
            Row("Latency", _latency()),
            Row("Queue and KV cache", _resources()),
            Row("Size of requests", _sizes()),
        ],
    )


def _answer() -> list[Panel]:
    return [
        note(
            "From left to right: **does anyone wait** (running, waiting, queue time), **why** (the "
            "KV cache is full, sequences are preempted), **what does the GPU do** (busy is good, "
            "idle with work is not), and what a client sees of it (time to first token)."
        ),
        value(
            "Running",
            "Sequences with KV blocks, which are prefilled or decoded now. Never bad in itself.",
            promql.total("nanovllm_num_requests_running"),
            REQUESTS,
        ),
        stats.waiting(),
        value(
            "Queue time p95",
            "From arrival to admission, for 95 of 100 sequences that ended lately. Bad when it is "
            "a large part of the time to first token.",
            promql.quantile(0.95, _QUEUE_TIME),
            SECONDS,
            Limits(0.5, 2),
        ),
        value(
            "KV cache used",
            "Share of the KV blocks that sequences own, of the executor where it is the largest. "
            "Bad near 1: new sequences wait for memory and running ones are preempted.",
            f"max ({promql.select('nanovllm_kv_cache_usage_ratio')})",
            SHARE,
            Limits(0.9, 0.98),
        ),
        value(
            "Preemptions",
            "Sequences that lost their blocks to others and are computed again. Bad when it stays "
            "above zero: work is done twice because the KV cache is too small.",
            promql.per_second("nanovllm_num_preemptions_total"),
            PER_S,
            Limits(0.01, 1),
        ),
        stats.gpu_busy(),
        stats.gpu_idle(),
        value(
            "TTFT p95",
            "Time to first token from arrival, for 95 of 100 recent requests. What is bad depends "
            "on the use; the colours suppose a conversation.",
            promql.quantile(0.95, _TTFT),
            SECONDS,
            Limits(1, 2),
        ),
    ]


def _load() -> list[Panel]:
    return [
        graph(
            "Sequences ended, by outcome",
            "Completions per second: stop (end of sequence or stop string), length, abort (the "
            "client left or aborted), error. Bad when there are errors, or when many clients give "
            "up.",
            [
                Line(
                    "{{finished_reason}}",
                    promql.per_second("nanovllm_requests_total", by="finished_reason"),
                )
            ],
            REQUESTS_PER_S,
            stacked=True,
        ),
        graph(
            "Requests refused, by reason",
            "Requests refused before they were queued. invalid_field, duplicate_request, "
            "never_fits and client_limit are the client's; draining is wanted. The others are bad: "
            "the server has no room or no executor.",
            [
                Line(
                    "{{reason}}",
                    promql.per_second("nanovllm_admission_rejections_total", by="reason"),
                )
            ],
            REQUESTS_PER_S,
            stacked=True,
        ),
        graph(
            "Tokens per second",
            "Prompt tokens of sequences that got their first token, those of them found in the "
            "prefix cache, and generated tokens. Bad when generation falls while sequences wait.",
            [
                Line("prompt", promql.per_second("nanovllm_prompt_tokens_total")),
                Line(
                    "prompt, from the cache",
                    promql.per_second("nanovllm_prefix_cache_hits_total"),
                ),
                Line("generated", promql.per_second("nanovllm_generation_tokens_total")),
            ],
            TOKENS_PER_S,
        ),
    ]


def _latency() -> list[Panel]:
    return [
        percentiles(
            "Time to first token",
            "From arrival to the first token: queue, then prefill. Bad above the dashed line for a "
            "conversation. If it is high, compare with the queue time: the rest is prefill.",
            _TTFT,
            SECONDS,
            limit=2,
        ),
        percentiles(
            "Inter-token latency",
            "Time between tokens of a sequence. People read about ten tokens a second, so bad "
            "above 0.1 s. It grows with the batch and with prefill chunks in the same iteration.",
            _ITL,
            SECONDS,
            limit=0.1,
        ),
        percentiles(
            "Time of whole requests",
            "From arrival to the last token. Depends mostly on how much is generated; bad when it "
            "grows while the generated lengths do not.",
            _E2E,
            SECONDS,
        ),
        density(
            "Time to first token, distribution",
            "How many requests fell into which range. Two bands mean two kinds of requests, prefix "
            "hits and misses for instance; bad when the upper one consists of those that wait.",
            _TTFT,
            SECONDS,
        ),
        density(
            "Inter-token latency, distribution",
            "How many tokens fell into which range. Bad when a second band appears far above the "
            "first one: pauses by preemption or by long prefills.",
            _ITL,
            SECONDS,
        ),
        density(
            "Time of whole requests, distribution",
            "How many requests fell into which range. Bad when the mass moves up under the same "
            "load.",
            _E2E,
            SECONDS,
        ),
    ]


def _resources() -> list[Panel]:
    return [
        graph(
            "Sequences running and waiting",
            "Waiting above zero for long is bad; then running shows whether slots or KV blocks "
            "are short: with all slots taken, it stands at the executor's --max-num-seqs.",
            [
                Line("running", promql.total("nanovllm_num_requests_running")),
                Line("waiting", promql.total("nanovllm_num_requests_waiting")),
            ],
            REQUESTS,
            stepped=True,
        ),
        graph(
            "Where the time of a request goes",
            "Mean per sequence that ended: waiting in the queue, prefill, decoding. Bad when the "
            "queue is a visible part.",
            [
                Line("queue", promql.mean(_QUEUE_TIME)),
                Line("prefill", promql.mean("nanovllm_request_prefill_time_seconds")),
                Line("decode", promql.mean("nanovllm_request_decode_time_seconds")),
            ],
            SECONDS,
            stacked=True,
        ),
        percentiles(
            "Queue time",
            "From arrival to admission. Bad above the dashed line: clients wait for others.",
            _QUEUE_TIME,
            SECONDS,
            limit=2,
        ),
        graph(
            "KV cache used",
            "Share of the KV blocks that sequences own, of the executor where it is the largest; "
            "blocks that only hold cached prefixes do not count. Bad above the dashed line: give "
            "the executor more KV memory.",
            [Line("used", f"max ({promql.select('nanovllm_kv_cache_usage_ratio')})")],
            SHARE,
            limit=0.95,
            maximum=1,
        ),
        graph(
            "Prefix cache hit rate",
            "Share of the looked up prompt tokens whose KV was there already. Low is bad only if "
            "prompts ought to share beginnings, as system prompts and conversations do.",
            [
                Line(
                    "hit rate",
                    promql.ratio(
                        "nanovllm_prefix_cache_hits_total", "nanovllm_prefix_cache_queries_total"
                    ),
                )
            ],
            SHARE,
            maximum=1,
        ),
        graph(
            "Preemptions",
            "Sequences per second that lost their blocks to others. Bad when it lasts: every "
            "preempted sequence is prefilled again.",
            [Line("preemptions", promql.per_second("nanovllm_num_preemptions_total"))],
            PER_S,
        ),
    ]


def _sizes() -> list[Panel]:
    return [
        percentiles(
            "Prompt tokens per sequence",
            "Explains the time to first token: prefill takes time in proportion. Never bad in "
            "itself.",
            "nanovllm_request_prompt_tokens",
            TOKENS,
            width=_HALF,
        ),
        percentiles(
            "Generated tokens per sequence",
            "Explains the time of whole requests. Bad when lengths jump to the limit: the model "
            "no longer ends its answers.",
            "nanovllm_request_generation_tokens",
            TOKENS,
            width=_HALF,
        ),
    ]
