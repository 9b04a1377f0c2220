"""Dashboard "engine": what the two processes and the device do."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana import promql, stats
from deploy.grafana.frame import Row, build_dashboard
from deploy.grafana.panels import Limits, Line, Panel, density, graph, note, percentiles, value
from deploy.grafana.units import BYTES, CORES, COUNT, PER_S, SECONDS, SHARE, TOKENS_PER_S

_STEP = "nanovllm_step_duration_seconds"
_PLAN_DELAY = "nanovllm_plan_queue_delay_seconds"
_ROUND_TRIP = "nanovllm_executor_round_trip_seconds"
_RESULTS_DELAY = "nanovllm_results_queue_delay_seconds"
_LOOP_LAG = "nanovllm_event_loop_lag_seconds"
# Schedulers may reach their executors under the same addresses.
_EXECUTOR, _EXECUTOR_LEGEND = "instance, executor", "{{executor}} ({{instance}})"
_QUARTER = 6


def engine() -> Dashboard:
    """Builds the dashboard."""
    return build_dashboard(
        "nanovllm-engine",
        "nanovllm: engine",
        "Iterations, the stream between scheduler and executor, KV blocks and processes.",
        [
            Row("Does anyone wait, why, and what does the GPU do?", _answer()),
            Row("Device", _device()),
            Row("Between scheduler and executor", _stream()),
            Row("Executors", _executors()),
            Row("Slots and KV blocks", _memory()),
            Row("Processes", _processes()),
        ],
    )


def _answer() -> list[Panel]:
    return [
        note(
            "From left to right: **does anyone wait** (waiting), **why** (no executor, no free KV "
            "blocks, plans or the scheduler's event loop are late), **what does the GPU do** "
            "(slots, busy, idle with work, time of a decode iteration)."
        ),
        stats.waiting(),
        value(
            "Executors",
            "Executors with an open session. Bad below the number that there should be: the "
            "others do their work, or requests wait if there are none.",
            promql.total("nanovllm_executor_connected"),
            COUNT,
            Limits(None, 1, is_floor=True),
        ),
        value(
            "KV blocks to give",
            "Blocks that are free or only hold cached prefixes. Bad near zero: admissions wait and "
            "running sequences are preempted.",
            promql.total("nanovllm_scheduler_kv_blocks", 'state=~"free|cached"'),
            COUNT,
            Limits(8, 1, is_floor=True),
        ),
        value(
            "Round trip p95",
            "From handing a plan to the stream to the first result that knows it: the stream both "
            "ways and the iteration under way. Bad when it is much more than two iterations; the "
            "colours suppose those of a GPU.",
            promql.quantile(0.95, _ROUND_TRIP),
            SECONDS,
            Limits(0.25, 1),
        ),
        value(
            "Event-loop lag p99",
            "How much too late the scheduler's event loop wakes up. Bad above a few milliseconds "
            "on a GPU: plans and tokens are late by as much.",
            promql.quantile(0.99, _LOOP_LAG),
            SECONDS,
            Limits(0.02, 0.1),
        ),
        value(
            "Slots in use",
            "Sequences in the executor's batch. Bad at --max-num-seqs if others wait for a slot.",
            promql.total("nanovllm_slots_active"),
            COUNT,
        ),
        stats.gpu_busy(),
        stats.gpu_idle(),
    ]


def _device() -> list[Panel]:
    busy, idle = promql.device_share(stats.BUSY), promql.device_share(stats.IDLE)
    return [
        graph(
            "GPU time",
            "Share of the time: busy with iterations, idle although a slot could run, and the rest "
            "without any work. Bad when the middle part can be seen.",
            [
                Line("busy", busy),
                Line("idle with work", idle),
                Line("no work", f"clamp_min(1 - {busy} - {idle}, 0)"),
            ],
            SHARE,
            stacked=True,
            maximum=1,
        ),
        graph(
            "Iterations, by kind",
            "Iterations per second: decode only, prefill only, or both mixed. Bad when most "
            "are mixed and the inter-token latency is too high.",
            [Line("{{kind}}", promql.per_second(f"{_STEP}_count", by="kind"))],
            PER_S,
            stacked=True,
        ),
        graph(
            "Tokens computed, by kind",
            "Tokens per second in iterations of a kind, recomputed ones included. Never bad in "
            "itself; falls together with busy time.",
            [Line("{{kind}}", promql.per_second("nanovllm_step_tokens_total", by="kind"))],
            TOKENS_PER_S,
            stacked=True,
        ),
        graph(
            "Iteration time p95, by kind",
            "95 of 100 iterations are faster. Iterations with prefill chunks take longer; bad when "
            "that shows in the inter-token latency: lower --max-num-batched-tokens.",
            [Line("{{kind}}", promql.quantile(0.95, _STEP, by="kind"))],
            SECONDS,
        ),
        graph(
            "Decode iteration p50, by batch size",
            "Median time of decode iterations by the number of sequences in them. Bad when a line "
            "rises at the same batch size: the device got slower.",
            [Line("{{batch}}", promql.quantile(0.5, _STEP, 'kind="decode"', by="batch"))],
            SECONDS,
        ),
        density(
            "Iteration time, distribution",
            "How many iterations fell into which range. Single ones far above the rest are bad: "
            "pauses that every running request feels.",
            _STEP,
            SECONDS,
        ),
        graph(
            "Iterations replayed from CUDA graphs",
            "Share of the iterations that were one replay of a captured graph. On a GPU bad when "
            "it is low under pure decode load: --enforce-eager, or penalties and log-probabilities "
            "in the batch. Zero on a CPU.",
            [
                Line(
                    "replayed",
                    promql.ratio("nanovllm_cuda_graph_replays_total", f"{_STEP}_count"),
                )
            ],
            SHARE,
            maximum=1,
        ),
        graph(
            "Tokens computed again",
            "Tokens per second that were computed before and lost, by preemption or by the loss of "
            "the executor. Bad when it lasts.",
            [Line("recomputed", promql.per_second("nanovllm_recomputed_tokens_total"))],
            TOKENS_PER_S,
        ),
        percentiles(
            "Tokens in an iteration",
            "Prefill and decode tokens together. Bad when it stands at --max-num-batched-tokens: "
            "prompts wait for later iterations.",
            "nanovllm_iteration_tokens",
            COUNT,
        ),
    ]


def _stream() -> list[Panel]:
    return [
        percentiles(
            "Plan delay in the executor",
            "From the arrival of a plan to its application. About one iteration is normal; bad "
            "when it is several.",
            _PLAN_DELAY,
            SECONDS,
            width=_QUARTER,
        ),
        percentiles(
            "Stream round trip",
            "From handing a plan to the stream to the first result that knows it. Includes the "
            "iteration under way; decoding does not wait for it. Bad when it is many iterations.",
            _ROUND_TRIP,
            SECONDS,
            width=_QUARTER,
        ),
        percentiles(
            "Results delay in the executor",
            "From the end of an iteration on the device until its result is handed to gRPC. Bad "
            "above a few milliseconds: the executor's sender gets no CPU.",
            _RESULTS_DELAY,
            SECONDS,
            width=_QUARTER,
        ),
        graph(
            "Plans",
            "Plans per second from the scheduler. Fewer than iterations is the rule, because the "
            "executor decodes on its own; none at all under load is bad.",
            [Line("plans", promql.per_second("nanovllm_plans_total"))],
            PER_S,
            width=_QUARTER,
        ),
    ]


def _executors() -> list[Panel]:
    return [
        graph(
            "Sequences running, by executor",
            "Sequences with KV blocks at each executor. Bad when one has many and another none for "
            "long while sequences wait.",
            [_line_by_executor("nanovllm_num_requests_running")],
            COUNT,
            stepped=True,
        ),
        graph(
            "Sequences waiting, by executor",
            "Sequences in each executor's queue; none: they wait while no executor takes any, "
            "which is always bad. Bad as well when one queue stays longer than the others.",
            [_line_by_executor("nanovllm_num_requests_waiting")],
            COUNT,
            stepped=True,
        ),
        graph(
            "KV cache used, by executor",
            "Share of an executor's KV blocks that sequences own. Bad above the dashed line: what "
            "is sent there waits for memory.",
            [_line_by_executor("nanovllm_kv_cache_usage_ratio")],
            SHARE,
            limit=0.95,
            maximum=1,
        ),
        graph(
            "Sequences sent, by executor",
            "Sequences per second that were sent to an executor, new ones and moved ones. Follows "
            "the prefixes that it has cached; bad at zero under load, unless it is drained.",
            [
                Line(
                    _EXECUTOR_LEGEND,
                    promql.per_second("nanovllm_requests_routed_total", by=_EXECUTOR),
                )
            ],
            PER_S,
        ),
        graph(
            "Sequences moved, by reason",
            "In the last ten minutes, from one executor to another. lost: it went away, and what "
            "it had computed is computed again, which is bad; drained and removed: somebody wanted "
            "it; rebalanced: they waited where more was to be done.",
            [Line("{{reason}}", _increase("nanovllm_requests_moved_total", by="reason"))],
            COUNT,
            stepped=True,
        ),
        graph(
            "Stream round trip p95, by executor",
            "95 of 100 plans are acknowledged sooner. Bad when one executor is far above the "
            "others: its network, or a slower device.",
            [Line(_EXECUTOR_LEGEND, promql.quantile(0.95, _ROUND_TRIP, by=_EXECUTOR))],
            SECONDS,
        ),
        graph(
            "Executor connected",
            "1 while a session with the executor is open. Bad at 0: the others do its work, and "
            "without any requests wait and are refused after --executor-wait-timeout-s.",
            [_line_by_executor("nanovllm_executor_connected")],
            COUNT,
            stepped=True,
            maximum=1,
        ),
        graph(
            "Executor restarts",
            "New sessions after the first one, in the last ten minutes. Each one is bad: running "
            "requests pause and their tokens are computed again.",
            [Line(_EXECUTOR_LEGEND, _increase("nanovllm_executor_restarts_total", by=_EXECUTOR))],
            COUNT,
            stepped=True,
        ),
        graph(
            "Sessions ended, by reason",
            "In the last ten minutes. lost: process or network; stalled: no progress; fenced: "
            "another scheduler took the executor; refused: the executor serves another model or "
            "denied the session. protocol and bug are always bad: report them.",
            [Line("{{reason}}", _increase("nanovllm_executor_sessions_ended_total", by="reason"))],
            COUNT,
            stepped=True,
        ),
    ]


def _line_by_executor(gauge: str) -> Line:
    return Line(_EXECUTOR_LEGEND, promql.total(gauge, by=_EXECUTOR))


def _increase(counter: str, by: str) -> str:
    """Growth in ten minutes of what happens seldom."""
    return f"sum by ({by}) (increase({promql.select(counter)}[10m]))"


def _memory() -> list[Panel]:
    return [
        graph(
            "KV blocks, by state",
            "owned: sequences use them; cached: hold a known prefix and can be given away; free. "
            "Bad when owned takes everything.",
            [
                Line(
                    "{{state}}",
                    promql.total("nanovllm_scheduler_kv_blocks", by="state"),
                )
            ],
            COUNT,
            stacked=True,
            width=_QUARTER,
        ),
        graph(
            "Slots in use",
            "Sequences in the executor's batch. Bad when it stands at --max-num-seqs while others "
            "wait for a slot.",
            [Line("slots", promql.total("nanovllm_slots_active"))],
            COUNT,
            stepped=True,
            width=_QUARTER,
        ),
        graph(
            "Prompt tokens in the queue",
            "Work that waits. Divided by the prefill rate it is the time until a new request "
            "starts; bad when that is longer than clients accept.",
            [Line("queued", promql.total("nanovllm_num_queued_tokens"))],
            COUNT,
            stepped=True,
            width=_QUARTER,
        ),
        graph(
            "GPU memory",
            "Memory of the device by use; a constant zero without a GPU. other is what PyTorch "
            "holds beyond weights and KV cache; bad when it grows.",
            [
                Line(
                    "{{kind}}",
                    f"{promql.total('nanovllm_gpu_memory_bytes', by='kind')} "
                    'or on () label_replace(vector(0), "kind", "no GPU", "", "")',
                )
            ],
            BYTES,
            stacked=True,
            width=_QUARTER,
        ),
    ]


def _processes() -> list[Panel]:
    return [
        percentiles(
            "Event-loop lag of the scheduler",
            "How much too late a timer fires. Bad above the dashed line: the scheduler's core is "
            "overloaded and every token is late.",
            _LOOP_LAG,
            SECONDS,
            limit=0.1,
        ),
        graph(
            "CPU",
            "Cores that a process uses. The scheduler runs on one core; bad when it comes close "
            "to 1.",
            [Line("{{job}}", promql.per_second("process_cpu_seconds_total", by="job"))],
            CORES,
        ),
        graph(
            "Resident memory",
            "Memory of a process on the host. Bad when it grows without end.",
            [Line("{{job}}", promql.total("process_resident_memory_bytes", by="job"))],
            BYTES,
        ),
        graph(
            "Open file descriptors",
            "Connections, mostly. Bad near the process's limit: new clients are refused.",
            [Line("{{job}}", promql.total("process_open_fds", by="job"))],
            COUNT,
        ),
        graph(
            "Age of the processes",
            "Time since the latest start. A fall to zero is a restart; bad if nobody asked for it.",
            [
                Line(
                    "{{job}}",
                    f"time() - max by (job) ({promql.select('process_start_time_seconds')})",
                )
            ],
            SECONDS,
        ),
        graph(
            "Start of the executor",
            "How long the last start took: until the weights were loaded, and in all. Bad when it "
            "is longer than a restart may take.",
            [
                Line("load weights", f"max ({promql.select('nanovllm_model_load_seconds')})"),
                Line("in all", f"max ({promql.select('nanovllm_startup_seconds')})"),
            ],
            SECONDS,
            stepped=True,
        ),
    ]
