"""Traces of requests: made when a request is over, from times that were kept on its way.

One trace for each call: `nanovllm.request` with the children `queue`, `prefill` and `decode`, which
follow each other. Names are those of OpenTelemetry's conventions for generative AI and for RPC
(https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/, .../rpc/grpc/) where they have
one. No span holds text of prompts or outputs.
"""

import threading
import time
from collections.abc import Callable

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.util.types import AttributeValue

from scheduler_service.completion import Completion
from scheduler_service.history import EventKind, HistoryEvent
from scheduler_service.telemetry.call_record import CANCELLED, OK, CallRecord
from scheduler_service.validation import ChatPrompt, GenerateSpec

Attributes = dict[str, AttributeValue]

# How long the end of the process waits for the receiver of traces.
_FLUSH_S = 3.0


class RequestTracer:
    """Turns calls that are over into spans, on the event loop; their export has its own thread."""

    def __init__(self, provider: TracerProvider, model_name: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("nanovllm.scheduler_service")
        self._model_name = model_name

    def record(self, call: CallRecord) -> str | None:
        """Makes the spans of a call.

        Returns the id of its trace, whether sampled or not, or None if tracing is disabled.
        """
        to_ns = _wall_clock()
        carrier = {key: value for key, value in call.metadata if isinstance(value, str)}
        root = self._tracer.start_span(
            "nanovllm.request",
            context=propagate.extract(carrier, Context()),
            kind=SpanKind.SERVER,
            attributes=self._request_attributes(call),
            start_time=to_ns(call.arrived_s),
        )
        if root.is_recording():
            root.set_attributes(_outcome_attributes(call))
            if call.code not in (OK, CANCELLED):
                # Not the error's message: a chat template may quote the prompt in it.
                reason = f": {call.error.label}" if call.error is not None else ""
                root.set_status(Status(StatusCode.ERROR, f"{call.code}{reason}"))
            parent = trace.set_span_in_context(root, Context())
            for completion in call.completions:
                _add_events(root, completion, to_ns)
                self._add_phases(call, completion, parent, to_ns)
        root.end(to_ns(call.ended_s))
        context = root.get_span_context()
        return trace.format_trace_id(context.trace_id) if context.is_valid else None

    def close(self) -> None:
        """Sends what was not sent yet, if the receiver takes it in a moment."""
        # The SDK waits for a receiver that does not answer for as long as its export timeout.
        flush = threading.Thread(target=self._provider.shutdown, name="trace flush", daemon=True)
        flush.start()
        flush.join(_FLUSH_S)

    def _request_attributes(self, call: CallRecord) -> Attributes:
        caller_key = "enduser.id" if call.caller.is_authenticated else "client.address"
        attributes: Attributes = {
            "gen_ai.provider.name": "nanovllm",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.id": call.shown_request_id(),
            "rpc.system.name": "grpc",
            "rpc.method": call.method,
            caller_key: call.caller.name,
        }
        if call.spec is not None:
            attributes.update(_sampling_attributes(call.spec))
        return attributes

    def _add_phases(
        self,
        call: CallRecord,
        completion: Completion,
        parent: Context,
        to_ns: Callable[[float], int],
    ) -> None:
        attributes: dict[str, Attributes] = {
            "queue": {},
            "prefill": _prefill_attributes(completion),
            "decode": _decode_attributes(completion),
        }
        for phase in call.phases_of(completion):
            span = self._tracer.start_span(
                phase.name,
                context=parent,
                attributes={
                    "nanovllm.completion.index": completion.index,
                    **attributes[phase.name],
                },
                start_time=to_ns(phase.start_s),
            )
            span.end(to_ns(phase.end_s))


def _wall_clock() -> Callable[[float], int]:
    """From `time.monotonic()` to nanoseconds since 1970, the same for all times of one trace.

    Made anew for each trace, since the system's clock may be set while the process runs.
    """
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda time_s: int(time_s * 1e9) + offset_ns


def _sampling_attributes(spec: GenerateSpec) -> Attributes:
    sampling = spec.samplings[0]
    attributes: Attributes = {
        "gen_ai.operation.name": "chat"
        if isinstance(spec.prompt, ChatPrompt)
        else "text_completion",
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.seed": sampling.seed,
        "nanovllm.request.priority": spec.priority,
    }
    if spec.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = spec.max_tokens
    if spec.n > 1:
        attributes["gen_ai.request.choice.count"] = spec.n
    if sampling.presence_penalty:
        attributes["gen_ai.request.presence_penalty"] = sampling.presence_penalty
    if sampling.frequency_penalty:
        attributes["gen_ai.request.frequency_penalty"] = sampling.frequency_penalty
    return attributes


def _outcome_attributes(call: CallRecord) -> Attributes:
    attributes: Attributes = {"rpc.response.status_code": call.code}
    if call.code not in (OK, CANCELLED):
        attributes["error.type"] = call.code
    if call.error is not None:
        attributes["nanovllm.error.reason"] = call.error.label
    seqs = [completion.seq for completion in call.completions]
    if not seqs:
        return attributes
    attributes["gen_ai.usage.input_tokens"] = seqs[0].num_prompt_tokens
    attributes["gen_ai.usage.output_tokens"] = sum(seq.num_output_tokens for seq in seqs)
    attributes["gen_ai.usage.cache_read.input_tokens"] = seqs[0].num_cached_tokens
    attributes["gen_ai.response.finish_reasons"] = [
        seq.finish_reason.value for seq in seqs if seq.finish_reason is not None
    ]
    attributes["nanovllm.preemptions"] = sum(seq.num_preemptions for seq in seqs)
    attributes["nanovllm.executor.losses"] = max(seq.num_executor_losses for seq in seqs)
    if call.first_token_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = call.first_token_s - call.arrived_s
    return attributes


def _admissions(completion: Completion) -> list[HistoryEvent]:
    history = completion.seq.history
    events = history.events if history is not None else []
    return [event for event in events if event.kind is EventKind.ADMITTED]


def _prefill_attributes(completion: Completion) -> Attributes:
    admissions, history = _admissions(completion), completion.seq.history
    attributes: Attributes = {"nanovllm.cached_tokens": completion.seq.num_cached_tokens}
    if admissions:
        attributes.update(_admission_attributes(admissions[0]))
    if history is not None and history.first_iteration is not None:
        attributes["nanovllm.iteration.first"] = history.first_iteration
    return attributes


def _decode_attributes(completion: Completion) -> Attributes:
    admissions, history = _admissions(completion), completion.seq.history
    attributes: Attributes = {"nanovllm.output_tokens": completion.seq.num_output_tokens}
    if admissions:
        attributes.update(_admission_attributes(admissions[-1]))
    if history is not None and history.last_iteration is not None:
        attributes["nanovllm.iteration.last"] = history.last_iteration
    return attributes


def _admission_attributes(event: HistoryEvent) -> Attributes:
    return {
        "nanovllm.plan.id": event.step_id or 0,
        # A string: 64 bits without a sign are more than attributes have.
        "nanovllm.executor.epoch": str(event.executor_epoch),
    }


def _add_events(root: Span, completion: Completion, to_ns: Callable[[float], int]) -> None:
    index: Attributes = {"nanovllm.completion.index": completion.index}
    if completion.first_token_s is not None:
        root.add_event("first_token", index, to_ns(completion.first_token_s))
    history = completion.seq.history
    was_admitted = False
    for event in history.events if history is not None else []:
        if event.kind is not EventKind.ADMITTED:
            root.add_event(event.kind.value, index, to_ns(event.time_s))
        elif was_admitted:
            attributes = index | _admission_attributes(event)
            root.add_event("readmitted", attributes, to_ns(event.time_s))
        was_admitted = was_admitted or event.kind is EventKind.ADMITTED
