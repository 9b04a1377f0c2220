"""One log line for each Generate call when it is over.

Lines on calls that were never queued are limited per second: a caller pays nothing for them.
"""

import logging
from collections import Counter

from nanovllm.logs import fields
from scheduler_service.errors import InvalidFieldError
from scheduler_service.telemetry.call_record import MAX_LOGGED_CHARS, CallRecord
from scheduler_service.telemetry.log_budget import LogBudget
from scheduler_service.validation import ChatPrompt, Prompt, TextPrompt

logger = logging.getLogger(__name__)


class RequestLog:
    """Writes the lines, on the running event loop.

    Lines hold neither prompt nor output unless `log_prompts` is set, then the beginnings of both.
    """

    #: Lines in a second on requests that were not queued.
    MAX_UNQUEUED_PER_S = 10

    def __init__(self, *, log_prompts: bool = False) -> None:
        self.log_prompts = log_prompts
        self._unqueued = LogBudget(self.MAX_UNQUEUED_PER_S, _write_rest)

    def write(self, call: CallRecord, trace_id: str | None = None) -> None:
        """Writes the line of a call that is over."""
        if not logger.isEnabledFor(logging.INFO):
            return
        if not call.was_queued and not self._unqueued.allows(_reason(call) or call.code):
            return
        if call.is_refused:
            logger.info("request refused", extra=_refused(call, trace_id))
        else:
            logger.info("request ended", extra=self._ended(call, trace_id))

    def close(self) -> None:
        """Writes what is left to say."""
        self._unqueued.close()

    def _ended(self, call: CallRecord, trace_id: str | None) -> dict[str, object]:
        spans_ms = {f"{phase.name}_ms": _ms(phase.end_s - phase.start_s) for phase in call.phases()}
        seqs = [completion.seq for completion in call.completions]
        reasons = dict.fromkeys(seq.finish_reason.value for seq in seqs if seq.finish_reason)
        first_token_s = call.first_token_s
        return fields(
            request_id=call.shown_request_id(),
            caller=call.caller.name,
            code=call.code,
            reason=_reason(call),
            finish_reason=",".join(reasons) or None,
            n=len(seqs),
            prompt_tokens=seqs[0].num_prompt_tokens if seqs else None,
            output_tokens=sum(seq.num_output_tokens for seq in seqs),
            cached_tokens=seqs[0].num_cached_tokens if seqs else None,
            ttft_ms=None if first_token_s is None else _ms(first_token_s - call.arrived_s),
            **(spans_ms if seqs else {}),
            total_ms=_ms(call.ended_s - call.arrived_s),
            preemptions=sum(seq.num_preemptions for seq in seqs),
            executor_losses=max((seq.num_executor_losses for seq in seqs), default=0),
            trace_id=trace_id,
            prompt=_shown(call.spec.prompt) if self.log_prompts and call.spec else None,
            output=call.texts.shown() if call.texts is not None else None,
        )


def _write_rest(left_out: Counter[str]) -> None:
    logger.info("more requests refused", extra=fields(count=left_out.total(), **left_out))


def _refused(call: CallRecord, trace_id: str | None) -> dict[str, object]:
    error = call.error
    return fields(
        request_id=call.shown_request_id() or None,
        caller=call.caller.name,
        code=call.code,
        reason=_reason(call),
        # Not the message: a chat template may quote the prompt in it.
        field=error.field if isinstance(error, InvalidFieldError) else None,
        total_ms=_ms(call.ended_s - call.arrived_s),
        trace_id=trace_id,
    )


def _reason(call: CallRecord) -> str | None:
    return call.error.label if call.error is not None else None


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _shown(prompt: Prompt) -> str:
    """The beginning of a prompt."""
    match prompt:
        case TextPrompt(text):
            shown = text
        case ChatPrompt(turns):
            # Enough turns for the limit; a conversation may have thousands.
            shown = "\n".join(
                f"{turn.role}: {turn.content}"[: MAX_LOGGED_CHARS + 1]
                for turn in turns[:MAX_LOGGED_CHARS]
            )
        case _:
            shown = str(prompt.token_ids[:MAX_LOGGED_CHARS])
    return shown if len(shown) <= MAX_LOGGED_CHARS else f"{shown[:MAX_LOGGED_CHARS]}..."
