"""What the engine's work adds to the metrics: iterations, tokens, ends of requests."""

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from scheduler_service.completion import Completion
from scheduler_service.sequence import FinishReason
from scheduler_service.telemetry.metrics import SchedulerMetrics


class EngineMetrics(Protocol):
    """Who the engine tells of its work, on the event loop. Times are of `time.monotonic()`."""

    def on_iteration(self, num_tokens: int) -> None:
        """An iteration computed tokens."""

    def on_tokens(self, progress: Iterable[tuple[Completion, int]], now_s: float) -> None:
        """Completions got tokens, each as many as stand beside it, in one message of results.

        Their token times are still those of the tokens before.
        """

    def on_finished(self, completion: Completion) -> None:
        """A completion ended."""

    def on_request_finished(
        self, completions: Sequence[Completion], max_tokens: int | None
    ) -> None:
        """The last completion of a request ended; `max_tokens` is what the request asked for."""


class RequestMetrics:
    """Records in a `SchedulerMetrics`; see `EngineMetrics`."""

    def __init__(self, metrics: SchedulerMetrics) -> None:
        self._metrics = metrics

    def on_iteration(self, num_tokens: int) -> None:
        """An iteration computed tokens."""
        self._metrics.iteration_tokens.observe(num_tokens)

    def on_tokens(self, progress: Iterable[tuple[Completion, int]], now_s: float) -> None:
        """Completions got tokens, in one message of results."""
        metrics = self._metrics
        num_generated = num_prompt = 0
        # Sequences that decode together have equal gaps, so most messages are one observation.
        gaps: dict[tuple[float, int], int] = {}
        for completion, count in progress:
            num_generated += count
            last_s = completion.last_token_s
            if last_s is None:
                seq = completion.seq
                metrics.time_to_first_token.observe(now_s - seq.arrival_s)
                num_prompt += seq.num_prompt_tokens
                # What came together with the first token has no distance from it.
                last_s = now_s
                count -= 1
            gaps[last_s, count] = gaps.get((last_s, count), 0) + 1
        for (last_s, count), num_completions in gaps.items():
            if count:
                gap_s = (now_s - last_s) / count
                metrics.inter_token_latency.observe(gap_s, count * num_completions)
        if num_generated:
            metrics.generation_tokens.inc(num_generated)
        if num_prompt:
            metrics.prompt_tokens.inc(num_prompt)

    def on_finished(self, completion: Completion) -> None:
        """Records the end of a completion and how long its phases took."""
        metrics = self._metrics
        seq = completion.seq
        metrics.count_finished(seq.finish_reason or FinishReason.ERROR)
        metrics.request_prompt_tokens.observe(seq.num_prompt_tokens)
        metrics.request_generation_tokens.observe(completion.num_generated_tokens)
        metrics.e2e_request_latency.observe(time.monotonic() - seq.arrival_s)
        admitted_s = seq.first_admitted_s
        if admitted_s is None:
            return
        metrics.request_queue_time.observe(admitted_s - seq.queued_s)
        first_s, last_s = completion.first_token_s, completion.last_token_s
        if first_s is None or last_s is None:
            return
        metrics.request_prefill_time.observe(first_s - admitted_s)
        metrics.request_decode_time.observe(last_s - first_s)
        metrics.request_inference_time.observe(last_s - admitted_s)
        num_gaps = completion.num_generated_tokens - 1
        metrics.request_time_per_output_token.observe(
            (last_s - first_s) / num_gaps if num_gaps else 0.0
        )

    def on_request_finished(
        self, completions: Sequence[Completion], max_tokens: int | None
    ) -> None:
        """Records what a request asked for and the longest of what it got."""
        metrics = self._metrics
        metrics.request_params_n.observe(len(completions))
        if max_tokens is not None:
            metrics.request_params_max_tokens.observe(max_tokens)
        longest = max(completion.num_generated_tokens for completion in completions)
        metrics.request_max_num_generation_tokens.observe(longest)
