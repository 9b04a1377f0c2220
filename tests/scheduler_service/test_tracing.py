"""Spans of requests: what they say, when they begin and end, and what is never in them."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from opentelemetry.trace import SpanKind, StatusCode

from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.errors import InvalidFieldError, QueueFullError
from scheduler_service.telemetry.call_record import CallRecord
from scheduler_service.telemetry.request_observer import RequestObserver
from scheduler_service.telemetry.tracing import RequestTracer
from scheduler_service.text.tokenizer import Tokenizer
from scheduler_service.validation import validate_generate
from tests.scheduler_service.engine_harness import CAPACITY, MODEL, EngineHarness, settle

PROMPT = [0, 1, 2, 1, 1]
TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"
Scenario = Callable[["Traced"], Awaitable[None]]


class Traced:
    """An engine whose calls are traced into memory, as the servicer does it."""

    def __init__(self, tokenizer: Tokenizer, sampler: Sampler | None) -> None:
        self.harness = EngineHarness(tokenizer, connect=False)
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.observer = RequestObserver(tracer=RequestTracer(provider, MODEL.name))

    def call(
        self, *, traceparent: str | None = None, prompt: tuple[int, ...] = tuple(PROMPT), **params
    ) -> "asyncio.Task[CallRecord]":
        """A request in a task of its own."""
        request = pb.GenerateRequest(
            request_id="mine",
            token_ids=pb.TokenIds(ids=prompt),
            sampling_params=pb.SamplingParams(**({"ignore_eos": True} | params)),
        )
        return asyncio.create_task(self._generate(request, context_of(traceparent)))

    async def _generate(self, request: pb.GenerateRequest, context) -> CallRecord:
        engine = self.harness.engine
        with self.observer.observe(request, context) as call:
            call.spec = validate_generate(request, MODEL)
            with engine.reserve(call.spec) as reservation:
                live = engine.submit(reservation, list(request.token_ids.ids))
            call.begin(live)
            async for _ in engine.deltas(live):
                pass
        return call

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def span(self, name: str, index: int = 0) -> ReadableSpan:
        """The only span of a name, or that of one completion."""
        named = [span for span in self.spans if span.name == name]
        if name == "nanovllm.request":
            assert len(named) == 1
            return named[0]
        (found,) = [s for s in named if s.attributes["nanovllm.completion.index"] == index]
        return found


def context_of(traceparent: str | None = None) -> SimpleNamespace:
    """The parts of a gRPC context that an observer asks for."""
    metadata = (("user-agent", "test"), ("some-bin", b"\x00"))
    if traceparent is not None:
        metadata += (("traceparent", traceparent),)
    return SimpleNamespace(
        peer=lambda: "ipv4:10.0.0.5:41000",
        auth_context=dict,
        invocation_metadata=lambda: metadata,
        time_remaining=lambda: None,
    )


@pytest.fixture
def trace(tokenizer: Tokenizer) -> Callable[..., None]:
    """Runs a scenario."""

    def run(scenario: Scenario, sampler: Sampler | None = None) -> None:
        async def main() -> None:
            await scenario(Traced(tokenizer, sampler))

        asyncio.run(main())

    return run


def test_a_request_is_one_trace_below_its_callers_span(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect()
        task = t.call(traceparent=TRACEPARENT, max_tokens=4)
        await t.harness.finish(task)
        root = t.span("nanovllm.request")
        assert root.kind is SpanKind.SERVER
        assert root.parent is not None
        assert f"{root.parent.span_id:016x}" == PARENT_ID
        assert {f"{span.context.trace_id:032x}" for span in t.spans} == {TRACE_ID}
        for name in ("queue", "prefill", "decode"):
            assert t.span(name).parent.span_id == root.context.span_id
        assert len(t.spans) == 4

    trace(scenario)


@pytest.mark.parametrize("traceparent", [None, "", "nonsense", f"00-{'0' * 32}-{PARENT_ID}-01"])
def test_without_a_valid_callers_span_the_request_starts_a_trace(trace, traceparent):
    async def scenario(t: Traced) -> None:
        t.harness.connect()
        await t.harness.finish(t.call(traceparent=traceparent, max_tokens=1))
        assert t.span("nanovllm.request").parent is None

    trace(scenario)


def test_phases_follow_each_other_within_the_call_and_on_the_wall_clock(trace):
    async def scenario(t: Traced) -> None:
        before_ns = time.time_ns()
        task = t.call(max_tokens=4)
        await settle()
        t.harness.connect()
        await t.harness.finish(task)
        root = t.span("nanovllm.request")
        queue, prefill, decode = (t.span(name) for name in ("queue", "prefill", "decode"))
        assert root.start_time <= queue.start_time < queue.end_time
        assert queue.end_time == prefill.start_time < prefill.end_time
        assert prefill.end_time == decode.start_time <= decode.end_time <= root.end_time
        (first_token,) = [e for e in root.events if e.name == "first_token"]
        assert first_token.timestamp == decode.start_time
        # A step of the system's clock meanwhile would be a surprise, but not an error.
        tolerance_ns = 1_000_000_000
        assert before_ns - tolerance_ns < root.start_time
        assert root.end_time < time.time_ns() + tolerance_ns

    trace(scenario)


def test_the_request_has_the_attributes_of_the_generative_ai_conventions(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect()
        task = t.call(max_tokens=4, temperature=0.5, top_p=0.75, top_k=3, seed=7, n=2)
        await t.harness.finish(task)
        attributes = dict(t.span("nanovllm.request").attributes)
        assert 0 < attributes.pop("gen_ai.response.time_to_first_chunk") < 60
        assert attributes == {
            "gen_ai.provider.name": "nanovllm",
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "tiny",
            "gen_ai.request.max_tokens": 4,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_p": 0.75,
            "gen_ai.request.top_k": 3,
            "gen_ai.request.seed": 7,
            "gen_ai.request.choice.count": 2,
            "gen_ai.response.id": "mine",
            "gen_ai.response.finish_reasons": ("length", "length"),
            "gen_ai.usage.input_tokens": 5,
            "gen_ai.usage.output_tokens": 8,
            "gen_ai.usage.cache_read.input_tokens": 0,
            "rpc.system.name": "grpc",
            "rpc.method": "nanovllm.v1.InferenceService/Generate",
            "rpc.response.status_code": "OK",
            "client.address": "10.0.0.5",
            "nanovllm.request.priority": 0,
            "nanovllm.preemptions": 0,
            "nanovllm.executor.losses": 0,
        }
        assert t.span("nanovllm.request").status.status_code is StatusCode.UNSET

    trace(scenario)


def test_every_completion_has_its_own_phases(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect()
        await t.harness.finish(t.call(max_tokens=3, n=3))
        for index in range(3):
            assert t.span("decode", index).attributes["nanovllm.output_tokens"] == 3
        assert len(t.spans) == 1 + 3 * 3

    trace(scenario)


def test_cached_tokens_are_those_of_the_prefix_cache(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect()
        await t.harness.finish(t.call(max_tokens=3, prompt=(1,) * 9))
        t.exporter.clear()
        await t.harness.finish(t.call(max_tokens=3, prompt=(1,) * 9))
        root = t.span("nanovllm.request")
        assert root.attributes["gen_ai.usage.cache_read.input_tokens"] == 8
        assert t.span("prefill").attributes["nanovllm.cached_tokens"] == 8

    trace(scenario)


def test_phases_name_plan_iterations_and_executor(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect(replace(CAPACITY, executor_epoch=2**63))
        # So that neither plan nor iteration is the first.
        await t.harness.finish(t.call(max_tokens=6))
        t.exporter.clear()
        iteration_before = t.harness.executor._iteration
        plan_before = t.harness.plans[-1].step_id
        await t.harness.finish(t.call(max_tokens=4))
        prefill, decode = t.span("prefill").attributes, t.span("decode").attributes
        assert prefill["nanovllm.plan.id"] == plan_before + 1
        assert prefill["nanovllm.iteration.first"] == iteration_before + 1
        assert decode["nanovllm.iteration.last"] == iteration_before + 4
        assert prefill["nanovllm.executor.epoch"] == str(2**63)
        assert decode["nanovllm.executor.epoch"] == str(2**63)

    trace(scenario)


def test_iterations_are_right_where_many_arrive_in_one_message(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect()
        early = t.call(max_tokens=30)
        await settle()
        t.harness.executor.run_iteration()
        await settle()
        late = asyncio.create_task(
            t._generate(
                pb.GenerateRequest(
                    request_id="late",
                    token_ids=pb.TokenIds(ids=[2, 2]),
                    sampling_params=pb.SamplingParams(max_tokens=2, ignore_eos=True),
                ),
                context_of(),
            )
        )
        await settle()
        for _ in range(8):
            t.harness.executor.run_iteration()
        await t.harness.finish(early, late)
        spans = {s.attributes.get("gen_ai.response.id"): s for s in t.spans if s.parent is None}
        of_late = {
            s.name: s.attributes
            for s in t.spans
            if s.parent is not None and s.parent.span_id == spans["late"].context.span_id
        }
        assert of_late["prefill"]["nanovllm.iteration.first"] == 2
        assert of_late["decode"]["nanovllm.iteration.last"] == 3

    trace(scenario)


def test_preemption_and_readmission_are_events_in_order(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect(replace(CAPACITY, num_blocks=12))
        tasks = [t.call(max_tokens=24, n=2, seed=1)]
        await t.harness.finish(*tasks)
        root = t.span("nanovllm.request")
        assert root.attributes["nanovllm.preemptions"] >= 1
        names = [e.name for e in root.events if e.name != "first_token"]
        assert names[:2] == ["preempted", "readmitted"]
        preempted, readmitted = (e for e in root.events if e.name in names[:2])
        assert root.start_time < preempted.timestamp <= readmitted.timestamp < root.end_time
        assert readmitted.attributes["nanovllm.plan.id"] > 1

    trace(scenario)


def test_the_loss_of_an_executor_and_the_admission_to_the_next_are_events(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect(replace(CAPACITY, executor_epoch=11))
        task = t.call(max_tokens=8)
        for _ in range(3):
            await t.harness.step()
        t.harness.lose_executor()
        t.harness.connect(replace(CAPACITY, executor_epoch=22))
        await t.harness.finish(task)
        root = t.span("nanovllm.request")
        assert [e.name for e in root.events] == ["first_token", "executor_lost", "readmitted"]
        assert root.events[-1].attributes["nanovllm.executor.epoch"] == "22"
        assert root.attributes["nanovllm.executor.losses"] == 1
        assert t.span("prefill").attributes["nanovllm.executor.epoch"] == "11"
        assert t.span("decode").attributes["nanovllm.executor.epoch"] == "22"

    trace(scenario)


def test_a_request_that_never_ran_has_waited_and_nothing_else(trace):
    async def scenario(t: Traced) -> None:
        task = t.call(max_tokens=8)
        await settle()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert [span.name for span in t.spans] == ["queue", "nanovllm.request"]
        root = t.span("nanovllm.request")
        assert root.attributes["rpc.response.status_code"] == "CANCELLED"
        # Who cancels has no failure to look for.
        assert root.status.status_code is StatusCode.UNSET

    trace(scenario)


@pytest.mark.parametrize(
    ("error", "code", "label"),
    [
        (QueueFullError("full", 1.0), "RESOURCE_EXHAUSTED", "queue_full"),
        (
            InvalidFieldError("chat", "refused: my secret prompt"),
            "INVALID_ARGUMENT",
            "invalid_field",
        ),
    ],
)
def test_a_failure_is_an_error_with_its_code_and_without_its_message(trace, error, code, label):
    async def scenario(t: Traced) -> None:
        request = pb.GenerateRequest(request_id="mine", text="my secret prompt")
        with t.observer.observe(request, context_of()) as call:
            call.fail(error)
        (root,) = t.spans
        assert root.status.status_code is StatusCode.ERROR
        assert root.status.description == f"{code}: {label}"
        assert root.attributes["rpc.response.status_code"] == code
        assert root.attributes["error.type"] == code
        assert "secret" not in root.to_json()

    trace(scenario)


def test_a_bug_is_an_error_too(trace):
    async def scenario(t: Traced) -> None:
        with (
            pytest.raises(ZeroDivisionError),
            t.observer.observe(pb.GenerateRequest(), context_of(), "other.Service/Generate"),
        ):
            raise ZeroDivisionError
        (root,) = t.spans
        assert root.attributes["rpc.method"] == "other.Service/Generate"
        assert root.status.description == root.attributes["error.type"] == "INTERNAL"

    trace(scenario)


def test_a_deadline_that_cancels_the_call_has_its_own_code(trace):
    async def scenario(t: Traced) -> None:
        context = context_of()
        context.time_remaining = lambda: -0.001
        with (
            pytest.raises(asyncio.CancelledError),
            t.observer.observe(pb.GenerateRequest(), context),
        ):
            raise asyncio.CancelledError
        (root,) = t.spans
        assert root.attributes["rpc.response.status_code"] == "DEADLINE_EXCEEDED"

    trace(scenario)


def test_a_caller_that_is_not_sampled_gets_no_spans(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect()
        await t.harness.finish(t.call(traceparent=TRACEPARENT[:-2] + "00", max_tokens=2))
        assert t.spans == []

    trace(scenario)


def test_the_sampler_decides(trace):
    async def scenario(t: Traced) -> None:
        t.harness.connect()
        await t.harness.finish(t.call(max_tokens=2))
        assert t.spans == []

    trace(scenario, sampler=ALWAYS_OFF)


def test_without_a_tracer_nothing_is_written_down_on_the_way(tokenizer: Tokenizer):
    async def main() -> None:
        harness = EngineHarness(tokenizer)
        request = harness.submit(PROMPT, max_tokens=3)
        await harness.finish(harness.read(request))
        assert request.completions[0].seq.history is None

    asyncio.run(main())
