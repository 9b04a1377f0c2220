"""Many requests in one call: behind a real gRPC server, with a simulated executor."""

import asyncio
import logging
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc
from scheduler_service import many_answers, servicer
from scheduler_service.access.tenancy import Tenancy
from scheduler_service.drain import drain
from scheduler_service.errors import ShuttingDownError
from scheduler_service.intake import Intake
from scheduler_service.many_answers import ManyAnswers
from scheduler_service.telemetry import request_log
from scheduler_service.telemetry.call_record import CallRecord
from scheduler_service.telemetry.request_observer import RequestObserver
from scheduler_service.text.tokenizer import Tokenizer
from scheduler_service.validation import RequestKey
from tests.scheduler.simulated_executor import expected_output
from tests.scheduler_service.serving import LIMIT_S, Service, served, until

PROMPT = [0, 1, 1, 2]
# Windows as small as HTTP/2 has them by default, so that little has to be written to fill them.
SMALL_WINDOWS = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535))
# Some 190 bytes for each of 64 x 100 tokens: twenty times the window.
LARGE_ANSWER = {"n": 64, "max_tokens": 100, "logprobs": 20}
INVALID = {"temperature": -1}


@pytest.fixture
def serve(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario against the service; the executor iterates by itself meanwhile."""

    def run(scenario: Callable[[Service], Awaitable[None]], **options: Any) -> None:
        async def main() -> None:
            address = f"unix:{tmp_path}/scheduler.sock"
            async with (
                asyncio.timeout(2 * LIMIT_S),
                served(tokenizer, address, **options) as service,
            ):
                await scenario(service)

        asyncio.run(main())

    return run


@dataclass
class Answer:
    """What came of one request."""

    responses: list[pb.GenerateResponse] = field(default_factory=list)
    failure: pb.RequestFailure | None = None
    is_over: bool = False

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for r in self.responses if r.index == index for token in r.token_ids]

    @property
    def finish_reasons(self) -> list[int]:
        return [r.finish_reason for r in self.responses if r.finish_reason]


class ManyCall:
    """One call of GenerateMany, and what came of its requests by number."""

    def __init__(self, stub: inference_pb2_grpc.InferenceServiceStub, **options: Any) -> None:
        self.call = stub.GenerateMany(**options)
        self.messages: list[pb.GenerateManyResponse] = []
        self.answers: dict[int, Answer] = defaultdict(Answer)

    async def start(self, *starts: pb.NumberedRequest, cancels: tuple[int, ...] = ()) -> None:
        await self.call.write(pb.GenerateManyRequest(starts=starts, cancels=cancels))

    async def read_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert await self.read(), "the call ended too early"

    async def read(self) -> bool:
        """Takes in a message; returns whether there was one."""
        message = await self.call.read()
        if message is grpc.aio.EOF:
            return False
        self.messages.append(message)
        for item in message.responses:
            answer = self.answers[item.number]
            assert not answer.is_over, "something follows the end of a request"
            if item.HasField("response"):
                answer.responses.append(item.response)
            if item.HasField("failure"):
                answer.failure = item.failure
            answer.is_over = item.is_last
        return True

    async def finish(self, *, cancelled: tuple[int, ...] = ()) -> dict[int, Answer]:
        """Closes this side and reads to the end, which must be that of all but the cancelled."""
        await self.call.done_writing()
        while await self.read():
            pass
        assert await self.call.code() is grpc.StatusCode.OK
        for number, answer in self.answers.items():
            assert answer.is_over == (number not in cancelled)
        return self.answers

    def numbers_of_messages(self) -> list[set[int]]:
        return [{item.number for item in message.responses} for message in self.messages]


@asynccontextmanager
async def small_window_client(
    service: Service,
) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    async with grpc.aio.insecure_channel(service.address, options=SMALL_WINDOWS) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


class PromptClient:
    """Sends a request as soon as the last response to the one before is on its way."""

    def __init__(self, starts: list[pb.NumberedRequest]) -> None:
        self._starts = starts
        self._go_on = asyncio.Event()
        self.last: list[pb.NumberedResponse] = []

    async def messages(self) -> AsyncIterator[pb.GenerateManyRequest]:
        for each in self._starts:
            yield pb.GenerateManyRequest(starts=[each])
            await self._go_on.wait()
            self._go_on.clear()

    def context(self) -> Any:
        """The server's view of this client."""
        return SimpleNamespace(
            time_remaining=lambda: None,
            auth_context=dict,
            peer=lambda: "unix:",
            write=self._take,
        )

    async def _take(self, message: pb.GenerateManyResponse) -> None:
        last = [item for item in message.responses if item.is_last]
        self.last += last
        if last:
            self._go_on.set()


def start(number: int, text: str = "", **params: Any) -> pb.NumberedRequest:
    """A request called "r" and its number."""
    timeout_s, metadata = params.pop("timeout_s", None), params.pop("metadata", None)
    request = pb.GenerateRequest(
        request_id=f"r{number}",
        sampling_params=pb.SamplingParams(**({"ignore_eos": True, "max_tokens": 9} | params)),
    )
    if text:
        request.text = text
    else:
        request.token_ids.ids.extend(prompt_of(number))
    return pb.NumberedRequest(
        number=number, request=request, timeout_s=timeout_s, metadata=metadata
    )


def prompt_of(number: int) -> list[int]:
    return [*PROMPT, number % 8]


def output_of(number: int, max_tokens: int = 9) -> list[int]:
    prompt = prompt_of(number)
    return expected_output(prompt, len(prompt) + max_tokens, ())


def rejections(service: Service, reason: str) -> float:
    labels = {"model_name": "tiny", "reason": reason}
    name = "nanovllm_admission_rejections_total"
    return service.harness.metrics.registry.get_sample_value(name, labels) or 0.0


def log_fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if record.name == request_log.__name__]


class TestAnswers:
    def test_each_request_gets_what_a_call_of_its_own_would(self, serve, tokenizer):
        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            starts = [start(number, n=1 + number % 3, logprobs=2) for number in range(20)]
            await many.start(*starts[:11])
            await many.start(*starts[11:])
            answers = await many.finish()
            for each in starts:
                answer = answers[each.number]
                for index in range(each.request.sampling_params.n):
                    assert answer.token_ids(index) == output_of(each.number)
                    mine = [r for r in answer.responses if r.index == index]
                    assert "".join(r.text for r in mine) == tokenizer.decode(output_of(each.number))
                    assert sum(len(r.logprobs) for r in mine) == 9
                    assert [r.HasField("usage") for r in mine] == [False] * (len(mine) - 1) + [True]
                assert {r.request_id for r in answer.responses} == {each.request.request_id}
            assert sum(len(message.responses) for message in many.messages) > len(many.messages)

        serve(scenario)

    def test_a_number_is_free_again_once_its_request_has_ended(self, serve):
        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            for _ in range(3):
                many.answers.clear()
                await many.start(start(7))
                await many.read_until(lambda: many.answers[7].is_over)
                assert many.answers[7].token_ids() == output_of(7)
                many.answers.clear()
                await many.start(start(7, **INVALID))
                await many.read_until(lambda: many.answers[7].is_over)
                assert many.answers[7].failure is not None
            await many.finish()

        serve(scenario)

    def test_a_number_is_free_at_the_moment_when_its_last_response_is_written(self, serve):
        async def scenario(service: Service) -> None:
            client = PromptClient([start(7), start(7, **INVALID), start(7), start(7)])
            intake = Intake(
                service.harness.engine, service.encoder, service.harness.metrics, Tenancy()
            )
            answers = ManyAnswers(
                client.context(), service.harness.engine, intake, RequestObserver(), 60.0
            )
            await answers.serve(client.messages())
            assert [item.HasField("failure") for item in client.last] == [False, True, False, False]

        serve(scenario)

    def test_an_error_ends_its_request_alone_and_is_counted(self, serve):
        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            await many.start(start(1), start(2, **INVALID), start(3))
            answers = await many.finish()
            error = answers[2].failure
            assert error is not None
            assert error.code == code_pb2.INVALID_ARGUMENT
            bad_request = error_details_pb2.BadRequest()
            assert error.details[0].Unpack(bad_request)
            assert bad_request.field_violations[0].field == "sampling_params.temperature"
            assert error.message.startswith("sampling_params.temperature: ")
            for number in (1, 3):
                assert answers[number].token_ids() == output_of(number)
            assert rejections(service, "invalid_field") == 1

        serve(scenario)

    def test_every_request_has_a_log_line(self, serve, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO, request_log.__name__)

        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            await many.start(*map(start, range(4)), start(4, **INVALID))
            await many.finish()

        serve(scenario)
        lines = {line["request_id"]: line for line in log_fields(caplog)}
        assert set(lines) == {f"r{number}" for number in range(5)}
        assert all(lines[f"r{number}"]["code"] == "OK" for number in range(4))
        assert all(lines[f"r{number}"]["output_tokens"] == 9 for number in range(4))
        assert lines["r4"]["field"] == "sampling_params.temperature"

    def test_a_request_belongs_to_its_own_trace_or_to_that_of_the_call(
        self, serve, monkeypatch: pytest.MonkeyPatch
    ):
        class Tracer:
            def __init__(self) -> None:
                self.calls: dict[str, CallRecord] = {}

            def record(self, call: CallRecord) -> None:
                self.calls[call.request_id] = call

            def close(self) -> None:
                pass

        tracer = Tracer()
        monkeypatch.setattr(servicer, "RequestObserver", lambda: RequestObserver(tracer=tracer))

        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub, metadata=(("traceparent", "of the call"),))
            await many.start(start(1, metadata={"traceparent": "its own"}), start(2))
            await many.finish()

        serve(scenario)
        assert dict(tracer.calls["r1"].metadata)["traceparent"] == "its own"
        assert dict(tracer.calls["r2"].metadata)["traceparent"] == "of the call"
        assert {call.method for call in tracer.calls.values()} == {
            "nanovllm.v1.InferenceService/GenerateMany"
        }


class TestUnexpectedExceptions:
    @pytest.mark.parametrize("where", ["generate_response", "resume_info", "engine.submit"])
    def test_one_ends_its_request_alone_under_a_reference(
        self,
        serve,
        where: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ):
        def breaking(function: Callable[..., Any], is_victim: Callable[..., bool]) -> Any:
            def call(*args: Any) -> Any:
                if is_victim(*args):
                    raise ZeroDivisionError("secret")
                return function(*args)

            return call

        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            if where == "engine.submit":
                engine = service.harness.engine
                submit = breaking(engine.submit, lambda held, _: held.key.request_id == "r2")
                monkeypatch.setattr(engine, "submit", submit)
            else:
                is_victim = {
                    "generate_response": lambda request_id, _: request_id == "r2",
                    "resume_info": lambda request, *_: request.request_id == "r2",
                }[where]
                function = breaking(getattr(many_answers, where), is_victim)
                monkeypatch.setattr(many_answers, where, function)
            await many.start(start(1), start(2), start(3))
            await many.read_until(lambda: many.answers[2].is_over)
            # The call goes on.
            await many.start(start(4))
            answers = await many.finish()
            error = answers[2].failure
            assert error is not None
            assert error.code == code_pb2.INTERNAL
            reference = re.fullmatch(r".* reference ([0-9a-f]{8})", error.message)
            assert reference is not None
            assert "secret" not in error.message
            (record,) = [item for item in caplog.records if item.name.endswith("interception")]
            assert record.fields["reference"] == reference[1]
            assert record.exc_info is not None
            for number in (1, 3, 4):
                assert answers[number].token_ids() == output_of(number)

        serve(scenario)


class TestEndings:
    def test_cancelling_one_frees_it_wherever_it_is(self, serve, slow_tokenizer):
        async def scenario(service: Service) -> None:
            load, engine = service.harness.pool.load, service.harness.engine
            many = ManyCall(service.stub)
            service.iterating.clear()
            await many.start(
                start(1, n=7, max_tokens=100), start(2), start(3, n=2), start(4, "abc")
            )
            await service.harness.step()
            await until(lambda: load.num_running == 8 and RequestKey("r4") in engine._reservations)
            await many.start(cancels=(1, 3, 4, 99))
            await until(lambda: engine._reservations == {} and len(engine._requests) == 1)
            service.iterating.set()
            answers = await many.finish(cancelled=(1, 3, 4))
            assert answers[2].token_ids() == output_of(2)

        serve(scenario)

    def test_the_deadline_of_one_ends_it_alone_while_it_is_tokenized(self, serve, slow_tokenizer):
        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            await many.start(start(1, "abc", timeout_s=0.05), start(2))
            # Far less than the tokenizer takes.
            async with asyncio.timeout(LIMIT_S / 3):
                await many.read_until(lambda: many.answers[1].is_over)
            error = many.answers[1].failure
            assert error is not None
            assert error.code == code_pb2.DEADLINE_EXCEEDED
            assert not slow_tokenizer.is_set()
            assert RequestKey("r1") not in service.harness.engine._reservations
            assert (await many.finish())[2].token_ids() == output_of(2)

        serve(scenario)

    def test_the_deadline_of_one_ends_it_alone_while_it_waits(
        self, serve, caplog: pytest.LogCaptureFixture
    ):
        caplog.set_level(logging.INFO, request_log.__name__)

        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            await many.start(start(1, timeout_s=0.05), start(2, timeout_s=1e9))
            await many.read_until(lambda: many.answers[1].is_over)
            error = many.answers[1].failure
            assert error is not None
            assert error.code == code_pb2.DEADLINE_EXCEEDED
            assert service.harness.pool.load.num_waiting == 1
            service.harness.connect()
            assert (await many.finish())[2].token_ids() == output_of(2)

        serve(scenario, connect=False)
        line = next(line for line in log_fields(caplog) if line["request_id"] == "r1")
        # As a call of Generate would have it.
        assert (line["code"], line["reason"]) == ("DEADLINE_EXCEEDED", "deadline")
        assert line["finish_reason"] == "abort"

    def test_the_deadline_of_the_call_ends_all(self, serve):
        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub, timeout=0.2)
            await many.start(start(1), start(2, timeout_s=1e9))
            assert (await read_to_error(many)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.wait_for(service.harness.engine.wait_until_idle(), LIMIT_S)

        serve(scenario, connect=False)

    def test_cancelling_the_call_frees_everything(self, serve, slow_tokenizer):
        async def scenario(service: Service) -> None:
            engine = service.harness.engine
            many = ManyCall(service.stub)
            await many.start(*(start(number, n=3) for number in range(6)), start(6, "abc"))
            await until(lambda: len(engine._requests) == 6 and len(engine._reservations) == 1)
            many.call.cancel()
            await asyncio.wait_for(engine.wait_until_idle(), LIMIT_S)
            assert engine._reservations == {}

        serve(scenario, connect=False)

    def test_a_call_that_cannot_be_written_to_ends(self, serve):
        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            await many.start(start(1, max_tokens=1), start(2, max_tokens=100, logprobs=20))
            # It is still there when the call has ended: nothing depends on its client.
            error = await read_to_error(many)
            assert error.code() is not grpc.StatusCode.OK
            await asyncio.wait_for(service.harness.engine.wait_until_idle(), LIMIT_S)

        serve(scenario, server_options=(("grpc.max_send_message_length", 150),))

    def test_new_requests_are_refused_one_by_one_while_live_ones_finish(self, serve):
        async def scenario(service: Service) -> None:
            engine = service.harness.engine
            many = ManyCall(service.stub)
            service.iterating.clear()
            await many.start(start(1))
            await until(lambda: len(engine._requests) == 1)
            engine.refuse_new(ShuttingDownError("shutting down", 2.0))
            await many.start(start(2), start(3))
            await many.read_until(lambda: many.answers[2].is_over and many.answers[3].is_over)
            for number in (2, 3):
                error = many.answers[number].failure
                assert error is not None
                assert error.code == code_pb2.UNAVAILABLE
                hint = error_details_pb2.RetryInfo()
                assert error.details[0].Unpack(hint)
                assert hint.retry_delay.seconds == 2
            engine.refuse_new(None)
            await many.start(start(4))
            service.iterating.set()
            answers = await many.finish()
            for number in (1, 4):
                assert answers[number].token_ids() == output_of(number)

        serve(scenario)

    def test_an_old_call_takes_no_new_requests_and_finishes_those_it_has(
        self, serve, monkeypatch: pytest.MonkeyPatch
    ):
        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            service.iterating.clear()
            await many.start(start(1))
            await until(lambda: len(service.harness.engine._requests) == 1)
            monkeypatch.setattr(many_answers, "_MAX_AGE_S", 0.0)
            await many.start(start(2))
            service.iterating.set()
            answers = await many.finish()
            assert answers[1].token_ids() == output_of(1)
            assert answers[2].failure is not None
            assert answers[2].failure.code == code_pb2.UNAVAILABLE
            assert "open another" in answers[2].failure.message

        serve(scenario)

    def test_a_server_that_ends_lets_requests_finish_and_does_not_wait_for_the_call(self, serve):
        servers: list[grpc.aio.Server] = []

        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            service.iterating.clear()
            await many.start(start(1))
            await until(lambda: len(service.harness.engine._requests) == 1)
            draining = asyncio.create_task(drain(servers[0], service.harness.engine, LIMIT_S))
            await asyncio.sleep(0)
            await many.start(start(2))
            await many.read_until(lambda: many.answers[2].is_over)
            assert many.answers[2].failure is not None
            service.iterating.set()
            await many.read_until(lambda: many.answers[1].is_over)
            assert many.answers[1].token_ids() == output_of(1)
            # The client has not closed its side.
            await asyncio.wait_for(draining, LIMIT_S / 2)
            assert (await read_to_error(many)).code() is not grpc.StatusCode.OK

        serve(scenario, add_services=lambda server, *_: servers.append(server))


async def read_to_error(many: ManyCall) -> grpc.aio.AioRpcError:
    """The error that a call must end in."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await many.read_until(lambda: False)
    return caught.value


class TestMessages:
    def test_no_message_carries_more_requests_than_the_limit_and_all_arrive(self, serve):
        async def scenario(service: Service) -> None:
            engine = service.harness.engine
            many = ManyCall(service.stub)
            await many.start(*map(start, range(100)))
            await until(lambda: len(engine._requests) == 100)
            # Every one of them has news at once.
            for number in range(100):
                assert engine.abort(f"r{number}")
            answers = await many.finish()
            assert len(answers) == 100
            for answer in answers.values():
                assert answer.finish_reasons == [pb.FINISH_REASON_ABORT]
            sizes = [len(numbers) for numbers in many.numbers_of_messages()]
            assert max(sizes) == 32
            assert len(sizes) == 4

        serve(scenario, connect=False)

    def test_refusals_are_as_bounded_as_answers(self, serve, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(many_answers, "_MAX_REQUESTS_PER_MESSAGE", 3)

        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            await many.start(*(start(number, **INVALID) for number in range(40)))
            answers = await many.finish()
            assert sorted(answers) == list(range(40))
            assert all(answer.failure is not None for answer in answers.values())
            assert max(map(len, many.numbers_of_messages())) <= 3

        serve(scenario)

    def test_requests_without_news_do_not_hide_one_behind_them(
        self, serve, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(many_answers, "_MAX_REQUESTS_PER_MESSAGE", 1)

        async def scenario(service: Service) -> None:
            engine = service.harness.engine
            many = ManyCall(service.stub)
            await many.start(*map(start, range(5)))
            await until(lambda: len(engine._requests) == 5)
            assert engine.abort("r4")
            async with asyncio.timeout(LIMIT_S):
                await many.read_until(lambda: many.answers[4].is_over)
            many.call.cancel()

        serve(scenario, connect=False)

    def test_a_message_ends_behind_the_delta_that_reaches_the_size(
        self, serve, monkeypatch: pytest.MonkeyPatch
    ):
        limit = 20_000
        monkeypatch.setattr(many_answers, "_MAX_MESSAGE_BYTES", limit)

        async def scenario(service: Service) -> None:
            async with small_window_client(service) as slow:
                many = ManyCall(slow)
                await many.start(start(1, **LARGE_ANSWER), start(2, **LARGE_ANSWER))
                await many.read()
                scheduler = service.harness.scheduler
                # What is behind the window comes in one piece for each completion.
                await until(
                    lambda: (
                        bool(scheduler.num_running == scheduler.num_waiting == 0)
                        and all(r.is_finished for r in service.harness.engine._requests.values())
                    )
                )
                answers = await many.finish()
            for number in (1, 2):
                for index in range(64):
                    assert len(answers[number].token_ids(index)) == 100
            largest = max(item.ByteSize() for m in many.messages for item in m.responses)
            assert largest > limit / 2
            for message in many.messages:
                *first, _ = message.responses
                assert sum(item.ByteSize() for item in first) < limit

        serve(scenario, max_queued_requests=200)


class TestSlowReaders:
    def test_deltas_grow_together_while_the_transport_is_busy(self, serve):
        async def scenario(service: Service) -> None:
            async with small_window_client(service) as slow:
                many = ManyCall(slow)
                await many.start(start(1, **LARGE_ANSWER))
                await many.read()
                scheduler = service.harness.scheduler
                await until(
                    lambda: (
                        bool(scheduler.num_running == scheduler.num_waiting == 0)
                        and all(r.is_finished for r in service.harness.engine._requests.values())
                    )
                )
                answer = (await many.finish())[1]
            for index in range(64):
                mine = [r for r in answer.responses if r.index == index]
                assert sum(len(r.token_ids) for r in mine) == 100
                assert sum(len(r.logprobs) for r in mine) == 100
            # The window holds a few; what is generated behind it comes in one piece.
            assert len(answer.responses) < 64 * 100 / 4

        serve(scenario)

    def test_others_are_served_while_one_client_does_not_read(self, serve):
        async def scenario(service: Service) -> None:
            async with small_window_client(service) as slow:
                stalled, many = ManyCall(slow), ManyCall(service.stub)
                await stalled.start(start(1, **LARGE_ANSWER))
                await stalled.read()
                await many.start(start(2), start(3))
                answers = await many.finish()
                assert answers[2].token_ids() == output_of(2)
                stalled.call.cancel()

        serve(scenario)

    def test_a_client_that_stops_reading_loses_its_requests_and_is_told_when_it_reads(
        self, serve, caplog: pytest.LogCaptureFixture
    ):
        caplog.set_level(logging.INFO, request_log.__name__)

        async def scenario(service: Service) -> None:
            async with small_window_client(service) as slow:
                many = ManyCall(slow)
                await many.start(start(1, **LARGE_ANSWER), start(2, **LARGE_ANSWER))
                await many.read()
                await until(lambda: not service.harness.engine._requests)
                error = await read_to_error(many)
                assert error.code() is grpc.StatusCode.ABORTED
                assert "read nothing for 0.3 s" in (error.details() or "")

        serve(scenario, write_timeout_s=0.3, max_queued_requests=200)
        lines = {line["request_id"]: line for line in log_fields(caplog)}
        assert set(lines) == {"r1", "r2"}
        for line in lines.values():
            assert (line["code"], line["reason"]) == ("ABORTED", "slow_reader")

    def test_a_client_that_does_not_read_its_refusals_is_not_refused_any_more(
        self, serve, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(many_answers, "_MAX_UNSENT_FAILURES", 20)
        num_requests = 3000

        async def scenario(service: Service) -> None:
            async with small_window_client(service) as slow:
                many = ManyCall(slow)
                await many.start(*(start(number, **INVALID) for number in range(num_requests)))
                await until(is_writing)
                await until(lambda: not is_writing())
                assert (await read_to_error(many)).code() is grpc.StatusCode.ABORTED
                # The window holds hundreds; the others were not even looked at.
                assert 20 < rejections(service, "invalid_field") < num_requests / 2

        serve(scenario, write_timeout_s=0.5)

    def test_refusals_that_had_to_wait_all_arrive(self, serve, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(many_answers, "_MAX_UNSENT_FAILURES", 20)

        async def scenario(service: Service) -> None:
            many = ManyCall(service.stub)
            await many.start(*(start(number, **INVALID) for number in range(500)), start(500))
            answers = await many.finish()
            assert sorted(answers) == list(range(501))
            assert answers[500].token_ids() == output_of(500)

        serve(scenario)


def is_writing() -> bool:
    """Whether the server has a call of GenerateMany that it would write to."""
    return any(task.get_name() == "write many answers" for task in asyncio.all_tasks())
