"""What a completion adds to the metrics: with each batch of its tokens, and when it ends."""

import time

from scheduler_service.completion import Completion
from scheduler_service.metrics import SchedulerMetrics
from scheduler_service.sequence import FinishReason


def record_tokens(
    metrics: SchedulerMetrics, completion: Completion, count: int, now_s: float
) -> None:
    """Records `count` tokens that arrived together; `now_s` is a time of `time.monotonic()`."""
    metrics.generation_tokens.inc(count)
    seq = completion.seq
    if completion.first_token_s is None:
        completion.first_token_s = completion.last_token_s = now_s
        metrics.time_to_first_token.observe(now_s - seq.arrival_s)
        metrics.prompt_tokens.inc(seq.num_prompt_tokens)
        count -= 1
    if count and completion.last_token_s is not None:
        gap_s = (now_s - completion.last_token_s) / count
        metrics.inter_token_latency.observe(gap_s, count)
    completion.last_token_s = now_s


def record_finished(metrics: SchedulerMetrics, completion: Completion) -> None:
    """Records the end of a completion and how long its phases took."""
    seq = completion.seq
    reason = seq.finish_reason or FinishReason.ERROR
    metrics.count_finished(reason.value)
    now_s = time.monotonic()
    metrics.request_prompt_tokens.observe(seq.num_prompt_tokens)
    metrics.request_generation_tokens.observe(seq.num_output_tokens)
    metrics.e2e_request_latency.observe(now_s - seq.arrival_s)
    admitted_s = seq.first_admitted_s
    if admitted_s is None:
        return
    metrics.request_queue_time.observe(admitted_s - seq.arrival_s)
    if completion.first_token_s is not None:
        metrics.request_prefill_time.observe(completion.first_token_s - admitted_s)
        metrics.request_decode_time.observe(now_s - completion.first_token_s)
