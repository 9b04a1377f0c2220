"""One line for each request: what it says, what it never says, and how many there are at most."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

from nanovllm.logs import JsonFormatter
from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.completion import Delta
from scheduler_service.errors import InvalidFieldError, NoExecutorError, QueueFullError
from scheduler_service.telemetry import log_budget, request_log
from scheduler_service.telemetry.call_record import MAX_LOGGED_CHARS, CallRecord, OutputTexts
from scheduler_service.telemetry.request_log import RequestLog
from scheduler_service.telemetry.request_observer import RequestObserver
from scheduler_service.text.tokenizer import Tokenizer
from scheduler_service.validation import validate_generate
from tests.scheduler_service.engine_harness import MODEL, EngineHarness, settle

LIMIT_S = 30
SECRET = "my secret"


class Logged:
    """An engine whose calls are logged, as the servicer does it."""

    def __init__(self, tokenizer: Tokenizer, log: RequestLog) -> None:
        self.harness = EngineHarness(tokenizer)
        self.log = log
        self.observer = RequestObserver(log)
        self.tokenizer = tokenizer

    def call(self, request: pb.GenerateRequest, **params) -> "asyncio.Task[CallRecord]":
        request.sampling_params.MergeFrom(pb.SamplingParams(ignore_eos=True, **params))
        return asyncio.create_task(self._generate(request))

    async def _generate(self, request: pb.GenerateRequest) -> CallRecord:
        engine = self.harness.engine
        with self.observer.observe(request, context_of()) as call:
            call.spec = validate_generate(request, MODEL)
            # The simulated executor knows three tokens.
            prompt = [token % 3 for token in self.tokenizer.encode(request.text)]
            with engine.reserve(call.spec) as reservation:
                live = engine.submit(reservation, prompt)
            call.begin(live)
            async for delta in engine.deltas(live):
                if call.texts is not None:
                    call.texts.add(delta)
        return call

    def refuse(self, error: Exception, request_id: str = "mine") -> None:
        request = pb.GenerateRequest(request_id=request_id, text=SECRET)
        with self.observer.observe(request, context_of()) as call:
            call.fail(error)


def context_of() -> SimpleNamespace:
    """The parts of a gRPC context that an observer asks for."""
    return SimpleNamespace(
        peer=lambda: "ipv6:%5B::1%5D:41000", auth_context=dict, time_remaining=lambda: None
    )


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict]]:
    """The request log's lines so far, as JSON says them, without what all lines have."""
    caplog.set_level(logging.INFO, request_log.__name__)

    def read() -> list[dict]:
        found = []
        for record in caplog.records:
            if record.name == request_log.__name__:
                line = json.loads(JsonFormatter().format(record))
                found.append({k: v for k, v in line.items() if k not in ("ts", "level", "logger")})
        return found

    return read


@pytest.fixture
def log(tokenizer: Tokenizer) -> Callable[..., None]:
    """Runs a scenario."""

    def run(scenario: Callable[[Logged], Awaitable[None]], **options) -> None:
        async def main() -> None:
            await scenario(Logged(tokenizer, RequestLog(**options)))

        asyncio.run(main())

    return run


def text(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"request_id": "mine", "text": SECRET} | fields))


def test_a_request_is_one_line_with_its_tokens_times_and_end(log, lines):
    async def scenario(h: Logged) -> None:
        await h.harness.finish(h.call(text(), max_tokens=4))

    log(scenario)
    (line,) = lines()
    times = {name: line.pop(name) for name in list(line) if name.endswith("_ms")}
    assert line == {
        "message": "request ended",
        "request_id": "mine",
        "caller": "::1",
        "code": "OK",
        "finish_reason": "length",
        "n": 1,
        "prompt_tokens": len(SECRET),
        "output_tokens": 4,
        "cached_tokens": 0,
        "preemptions": 0,
        "executor_losses": 0,
    }
    assert set(times) == {"queue_ms", "prefill_ms", "decode_ms", "total_ms", "ttft_ms"}
    phases = times["queue_ms"] + times["prefill_ms"] + times["decode_ms"]
    assert phases == pytest.approx(times["total_ms"], abs=0.01)
    assert times["ttft_ms"] == pytest.approx(times["queue_ms"] + times["prefill_ms"], abs=0.01)


def test_the_completions_of_a_request_are_counted_together(log, lines):
    async def scenario(h: Logged) -> None:
        await h.harness.finish(h.call(text(), max_tokens=4, n=3))

    log(scenario)
    (line,) = lines()
    assert (line["n"], line["output_tokens"], line["finish_reason"]) == (3, 12, "length")


def test_a_cancelled_request_says_so(log, lines):
    async def scenario(h: Logged) -> None:
        task = h.call(text(), max_tokens=100)
        await h.harness.step()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    log(scenario)
    (line,) = lines()
    assert (line["code"], line["finish_reason"]) == ("CANCELLED", "abort")


def test_a_request_that_fails_later_has_code_and_reason(log, lines):
    async def scenario(h: Logged) -> None:
        with h.observer.observe(text(), context_of()) as call:
            call.begin(h.harness.submit([1, 1], request_id="mine"))
            await settle()
            call.fail(NoExecutorError("none", 1.0))
            h.harness.engine.abort("mine")

    log(scenario)
    (line,) = lines()
    assert line["message"] == "request ended"
    assert (line["code"], line["reason"]) == ("UNAVAILABLE", "no_executor")


def test_a_refusal_names_the_reason_and_the_field_but_not_the_message(log, lines):
    async def scenario(h: Logged) -> None:
        h.refuse(InvalidFieldError("chat", f"the template refused {SECRET}"))
        h.refuse(QueueFullError("full", 1.0))

    log(scenario)
    first, second = lines()
    assert first["message"] == second["message"] == "request refused"
    assert (first["code"], first["reason"], first["field"]) == (
        "INVALID_ARGUMENT",
        "invalid_field",
        "chat",
    )
    assert (second["code"], second["reason"]) == ("RESOURCE_EXHAUSTED", "queue_full")


def test_an_overload_is_a_few_lines_and_a_sum(log, lines, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(log_budget, "_WINDOW_S", 0.2)

    async def scenario(h: Logged) -> None:
        for _ in range(1000):
            h.refuse(QueueFullError("full", 1.0))
        for _ in range(5):
            h.refuse(NoExecutorError("none", 1.0))
        async with asyncio.timeout(LIMIT_S):
            while lines()[-1]["message"] != "more requests refused":
                await asyncio.sleep(0.01)
        h.refuse(QueueFullError("full", 1.0))

    log(scenario)
    *refused, total, later = lines()
    most = RequestLog.MAX_UNQUEUED_PER_S
    assert [line["message"] for line in refused] == ["request refused"] * most
    assert total == {
        "message": "more requests refused",
        "count": 1005 - most,
        "queue_full": 1000 - most,
        "no_executor": 5,
    }
    # The next second has lines of its own.
    assert later["message"] == "request refused"


def test_calls_that_their_callers_leave_before_they_are_queued_are_limited_too(log, lines):
    async def scenario(h: Logged) -> None:
        for _ in range(RequestLog.MAX_UNQUEUED_PER_S + 3):
            with (
                contextlib.suppress(asyncio.CancelledError),
                h.observer.observe(text(), context_of()),
            ):
                raise asyncio.CancelledError
        await h.harness.finish(h.call(text(), max_tokens=4))
        await h.observer.close()

    log(scenario)
    *left, queued, total = lines()
    assert [line["code"] for line in left] == ["CANCELLED"] * RequestLog.MAX_UNQUEUED_PER_S
    assert (queued["message"], queued["code"]) == ("request ended", "OK")
    assert (total["count"], total["CANCELLED"]) == (3, 3)


def test_the_end_of_the_process_loses_no_sum(log, lines):
    async def scenario(h: Logged) -> None:
        for _ in range(RequestLog.MAX_UNQUEUED_PER_S + 3):
            h.refuse(QueueFullError("full", 1.0))
        await h.observer.close()

    log(scenario)
    assert lines()[-1]["count"] == 3


def test_neither_prompt_nor_output_is_logged(log, lines):
    async def scenario(h: Logged) -> None:
        await h.harness.finish(h.call(text(), max_tokens=4, stop=[SECRET]))
        h.refuse(QueueFullError("full", 1.0))

    log(scenario)
    assert len(lines()) == 2
    assert "secret" not in str(lines())
    assert not {"prompt", "output"} & {name for line in lines() for name in line}


def test_log_prompts_shows_both(log, lines):
    async def scenario(h: Logged) -> None:
        task = h.call(text(), max_tokens=4)
        await h.harness.finish(task)
        output = task.result().completions[0].seq.token_ids[len(SECRET) :]
        (line,) = lines()
        assert line["prompt"] == SECRET
        assert line["output"] == h.tokenizer.decode(output)

    log(scenario, log_prompts=True)


@pytest.mark.parametrize(
    "prompt",
    [
        {"text": "x" * 100_000},
        {"chat": pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="x" * 100_000)])},
        {"token_ids": pb.TokenIds(ids=[1] * 200)},
    ],
    ids=["text", "chat", "token_ids"],
)
def test_what_is_shown_of_a_prompt_is_bounded(log, lines, prompt: dict):
    async def scenario(h: Logged) -> None:
        request = pb.GenerateRequest(request_id="mine", **prompt)
        with h.observer.observe(request, context_of()) as call:
            call.spec = validate_generate(request, MODEL)

    log(scenario, log_prompts=True)
    (line,) = lines()
    assert 100 < len(line["prompt"]) <= MAX_LOGGED_CHARS + len("...")


def test_what_is_shown_of_outputs_is_bounded_together(log, lines, monkeypatch):
    monkeypatch.setattr("scheduler_service.telemetry.call_record.MAX_LOGGED_CHARS", 10)

    async def scenario(h: Logged) -> None:
        await h.harness.finish(h.call(text(), max_tokens=50, n=2))

    log(scenario, log_prompts=True)
    (line,) = lines()
    assert sum(map(len, line["output"])) <= 11 + len("...")
    assert line["output"][-1] == "..."


def test_a_report_that_fails_is_logged_and_changes_nothing_for_the_client(
    caplog: pytest.LogCaptureFixture,
):
    class BrokenLog(RequestLog):
        def write(self, call: CallRecord, trace_id: str | None = None) -> None:
            raise ZeroDivisionError

    with RequestObserver(BrokenLog()).observe(text(), context_of()):
        pass
    (record,) = [r for r in caplog.records if r.name.startswith("scheduler_service")]
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


def test_one_large_delta_is_cut_too():
    texts = OutputTexts()
    for _ in range(3):
        texts.add(Delta(0, "x" * 100_000, [], []))
    assert texts.shown() == "x" * (MAX_LOGGED_CHARS + 1) + "..."


def test_an_id_of_any_length_is_cut(log, lines):
    async def scenario(h: Logged) -> None:
        h.refuse(InvalidFieldError("request_id", "too long"), request_id="x" * 100_000)

    log(scenario)
    assert len(lines()[0]["request_id"]) == 128


def test_with_a_higher_log_level_no_line_is_made(log, lines, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, request_log.__name__)

    async def scenario(h: Logged) -> None:
        await h.harness.finish(h.call(text(), max_tokens=4))
        h.refuse(QueueFullError("full", 1.0))

    log(scenario)
    assert lines() == []
