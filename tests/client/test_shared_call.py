"""`AsyncClient(share_call=True)` against scripted servers: whatever they do, no request hangs."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Span

from nanovllm import LLM, AsyncClient, ResumePolicy, SamplingParams, shared_call
from nanovllm.aio import AsyncDeltaStream
from nanovllm.channel import MAX_MESSAGE_BYTES
from nanovllm.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NanovllmError,
    OverloadedError,
    RequestCancelledError,
    RequestTooLargeError,
    ServerError,
    UnavailableError,
)
from nanovllm.load import GrpcTarget, LoadRequest, run_load
from nanovllm.v1 import inference_pb2 as pb
from tests.client.fake_server import error_status, overloaded
from tests.client.scripted_server import Peer, Script, Scripted, delta, scripted

LIMIT_S = 30.0
FAST = ResumePolicy(max_wait_s=20.0, initial_backoff_s=0.001, max_backoff_s=0.01)
TRACER = TracerProvider(shutdown_on_exit=False).get_tracer("test")


def traceparent(span: Span) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario with a client and the scripts of the calls that it opens."""

    def run(
        scenario: Callable[[AsyncClient, Scripted], Awaitable[None]],
        *scripts: Script,
        **options: Any,
    ) -> None:
        async def main() -> None:
            address = f"unix:{tmp_path}/scripted.sock"
            async with (
                asyncio.timeout(LIMIT_S),
                scripted(address, *scripts) as service,
                AsyncClient(address, share_call=True, **options) as client,
            ):
                await scenario(client, service)

        asyncio.run(main())

    return run


async def text_of(stream: AsyncDeltaStream) -> str:
    return "".join([item.text async for item in stream])


async def error_of(stream: AsyncDeltaStream) -> NanovllmError:
    with pytest.raises(NanovllmError) as caught:
        await text_of(stream)
    return caught.value


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0)


class TestAnswers:
    def test_interleaved_answers_are_told_apart_by_number(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(2)
            first, second = (start.number for start in peer.starts)
            await peer.send(
                pb.NumberedResponse(number=first, response=delta("a")),
                pb.NumberedResponse(number=second, response=delta("x")),
                pb.NumberedResponse(number=first, response=delta("b")),
            )
            await peer.say(second, "y", end=True)
            await peer.say(first, "c", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            texts = await asyncio.gather(text_of(client.stream("1")), text_of(client.stream("2")))
            assert texts == ["abc", "xy"]

        play(scenario, script)

    def test_an_end_without_an_event_is_an_end(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "a")
            await peer.send(pb.NumberedResponse(number=peer.starts[0].number, is_last=True))
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            assert await text_of(client.stream("1")) == "a"

        play(scenario, script)

    def test_a_failure_is_the_error_of_its_request_alone(self, play):
        violation = error_details_pb2.BadRequest.FieldViolation(field="text", description="no")

        async def script(peer: Peer) -> None:
            await peer.take(3)
            first, second, third = (start.number for start in peer.starts)
            bad_request = error_details_pb2.BadRequest(field_violations=[violation])
            await peer.fail(first, error_status(code_pb2.INVALID_ARGUMENT, "no", bad_request))
            await peer.fail(second, overloaded(1.25))
            await peer.say(third, "c", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            streams = [client.stream(text) for text in "abc"]
            invalid = await error_of(streams[0])
            assert isinstance(invalid, InvalidRequestError)
            assert invalid.fields == ("text",)
            overload = await error_of(streams[1])
            assert isinstance(overload, OverloadedError)
            assert overload.retry_after_s == 1.25
            assert await text_of(streams[2]) == "c"

        play(scenario, script)

    def test_the_call_carries_the_token_and_each_request_its_trace(self, play):
        async def script(peer: Peer) -> None:
            await peer.answer_all()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            traceparents = []

            async def generate(name: str) -> None:
                with TRACER.start_as_current_span(name) as span:
                    traceparents.append(traceparent(span))
                    await client.generate(name)

            await asyncio.gather(*map(generate, "ab"))
            await client.generate("untraced")
            (peer,) = service.peers
            assert peer.metadata["authorization"] == "Bearer secret"
            assert "traceparent" not in peer.metadata
            starts = [start for message in peer.messages for start in message.starts]
            sent = [dict(start.metadata) for start in starts]
            assert sent == [*({"traceparent": each} for each in traceparents), {}]

        play(scenario, script, token="secret")


class TestMessages:
    def test_requests_of_one_turn_travel_in_one_message(self, play):
        async def scenario(client: AsyncClient, service: Scripted) -> None:
            texts = [str(number) for number in range(300)]
            outputs = await asyncio.gather(*map(client.generate, texts))
            assert [output.text for output in outputs] == texts
            (peer,) = service.peers
            assert [len(message.starts) for message in peer.messages] == [300]

        play(scenario, Peer.answer_all)

    @pytest.mark.parametrize("sender", ["LLM", "run_load"])
    def test_the_first_of_many_requests_leave_while_the_others_are_built(self, play, sender):
        texts = [str(number) for number in range(300)]
        params = SamplingParams(max_tokens=9)

        def generate(address: str) -> None:
            with LLM(address=address) as llm:
                outputs = llm.generate(texts, params, use_tqdm=False)
            assert [output.text for output in outputs] == texts

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            if sender == "LLM":
                await asyncio.to_thread(generate, service.address)
            else:
                requests = [LoadRequest(text, params) for text in texts]
                timings = await run_load(GrpcTarget(client), requests, len(requests))
                assert all(timing.failure is None for timing in timings)
            (peer,) = service.peers
            sizes = [len(message.starts) for message in peer.messages]
            assert sum(sizes) == 300
            # While a message is on its way more of them gather.
            assert sizes[0] <= 8

        play(scenario, Peer.answer_all)

    def test_large_requests_travel_in_messages_of_about_a_megabyte(self, play):
        texts = [str(number) * 150_000 for number in range(10)]

        async def script(peer: Peer) -> None:
            await peer.take(len(texts))
            assert [start.request.text for start in peer.starts] == texts
            for start in peer.starts:
                await peer.say(start.number, "a", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            streams = [client.stream(text) for text in texts]
            assert [await text_of(stream) for stream in streams] == ["a"] * len(texts)
            (peer,) = service.peers
            assert [len(message.starts) for message in peer.messages] == [6, 4]
            assert max(message.ByteSize() for message in peer.messages) <= 1 << 20

        play(scenario, script)

    def test_the_largest_request_has_a_message_of_its_own(self, play):
        # With anything beside it, the message would be more than servers take.
        text = "x" * (MAX_MESSAGE_BYTES - 1000)

        async def script(peer: Peer) -> None:
            await peer.take(3)
            for start in peer.starts:
                await peer.say(start.number, "a", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            streams = [client.stream(each) for each in ("y" * 2000, text, "z" * 2000)]
            assert [await text_of(stream) for stream in streams] == ["a"] * 3
            sizes = [message.ByteSize() for message in service.peers[0].messages]
            assert len(sizes) == 3
            assert max(sizes) <= MAX_MESSAGE_BYTES

        play(scenario, script)

    def test_a_request_that_no_server_takes_fails_alone(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "a", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            good = client.stream("a")
            large = client.stream("x" * MAX_MESSAGE_BYTES)
            assert isinstance(await error_of(large), RequestTooLargeError)
            assert await text_of(good) == "a"

        play(scenario, script)


class TestCancelling:
    def test_what_comes_late_of_a_cancelled_request_is_ignored(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(2)
            doomed, kept = (start.number for start in peer.starts)
            await peer.say(doomed, "a")
            await peer.take(num_cancels=1)
            assert peer.cancels == [doomed]
            await peer.say(doomed, "late")
            await peer.say(kept, "b")
            await peer.say(doomed, "later", end=True)
            await peer.say(kept, "c", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            doomed, kept = client.stream("1"), client.stream("2")
            assert (await anext(doomed)).text == "a"
            doomed.close()
            assert await text_of(kept) == "bc"
            with pytest.raises(RequestCancelledError):
                await anext(doomed)

        play(scenario, script)

    def test_closing_forgets_what_was_not_read_and_wakes_who_waits(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(2)
            first, _ = (start.number for start in peer.starts)
            await peer.send(
                pb.NumberedResponse(number=first, response=delta("a")),
                pb.NumberedResponse(number=first, response=delta("b")),
            )
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            unread, waiting = client.stream("1"), client.stream("2")
            reading = asyncio.create_task(text_of(waiting))
            assert (await anext(unread)).text == "a"
            unread.close()
            waiting.close()
            with pytest.raises(RequestCancelledError):
                await anext(unread)
            with pytest.raises(RequestCancelledError):
                await reading

        play(scenario, script)

    def test_a_request_that_is_closed_before_it_was_sent_is_never_sent(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "a", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            doomed, kept = client.stream("doomed"), client.stream("kept")
            doomed.close()
            assert await text_of(kept) == "a"
            (peer,) = service.peers
            assert [start.request.text for start in peer.starts] == ["kept"]
            assert peer.cancels == []

        play(scenario, script)

    @pytest.mark.parametrize("how", ["cancel the reader", "drop the stream", "leave the block"])
    def test_whoever_gives_a_request_up_cancels_it(self, play, how: str):
        async def script(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "a")
            await peer.take(num_cancels=1)
            await peer.take(2)
            await peer.say(peer.starts[1].number, "b", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            stream = client.stream("1")
            if how == "leave the block":
                async with stream:
                    await anext(stream)
            else:
                await anext(stream)
            if how == "drop the stream":
                del stream
            elif how == "cancel the reader":
                reading = asyncio.create_task(text_of(stream))
                await asyncio.sleep(0)
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            await until(lambda: service.peers[0].cancels)
            assert await text_of(client.stream("2")) == "b"

        play(scenario, script)

    def test_closing_the_client_cancels_the_call_and_fails_every_request(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(2)
            await peer.say(peer.starts[0].number, "a")
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            streams = [client.stream("1"), client.stream("2")]
            await anext(streams[0])
            await client.close()
            for stream in streams:
                assert isinstance(await error_of(stream), RequestCancelledError)
            await service.peers[0].is_cancelled.wait()

        play(scenario, script)


class TestDeadlines:
    def test_the_server_is_told_the_limit_and_has_the_word_on_it(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(2)
            limited, unlimited = peer.starts
            assert limited.timeout_s == 25.0
            assert not unlimited.HasField("timeout_s")
            await peer.fail(limited.number, error_status(code_pb2.DEADLINE_EXCEEDED, "so late"))
            await peer.say(unlimited.number, "a", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            limited, unlimited = client.stream("1", timeout_s=25.0), client.stream("2")
            error = await error_of(limited)
            assert isinstance(error, DeadlineExceededError)
            assert str(error) == "so late"
            assert await text_of(unlimited) == "a"

        play(scenario, script)

    def test_a_limit_holds_whatever_the_server_does(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(1)
            await peer.take(num_cancels=1)
            assert peer.cancels == [peer.starts[0].number]
            await peer.answer_all()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            error = await error_of(client.stream("1", timeout_s=0.01))
            assert isinstance(error, DeadlineExceededError)
            await until(lambda: service.peers[0].cancels)

        play(scenario, script)

    @pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan")])
    def test_without_any_time_nothing_is_sent(self, play, timeout_s: float):
        async def script(peer: Peer) -> None:
            await peer.take(1)
            assert peer.starts[0].request.text == "good"
            await peer.say(peer.starts[0].number, "a", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            error = await error_of(client.stream("late", timeout_s=timeout_s))
            assert isinstance(error, DeadlineExceededError)
            assert await text_of(client.stream("good")) == "a"

        play(scenario, script)


class TestBrokenCalls:
    def test_its_status_is_the_error_of_every_live_request_and_the_next_opens_another(self, play):
        async def breaking(peer: Peer) -> None:
            await peer.take(3)
            await peer.say(peer.starts[0].number, "whole", end=True)
            await peer.say(peer.starts[1].number, "part")
            await peer.context.abort(grpc.StatusCode.ABORTED, "because of this")

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            whole, part, nothing = (client.stream(text) for text in "abc")
            assert isinstance(await error_of(nothing), ServerError)
            # What came before it is not lost.
            assert await text_of(whole) == "whole"
            assert (await anext(part)).text == "part"
            with pytest.raises(ServerError, match="because of this"):
                await anext(part)
            assert (await client.generate("next")).text == "next"
            assert len(service.peers) == 2

        play(scenario, breaking, Peer.answer_all)

    def test_an_end_that_comes_too_early_is_unavailable(self, play):
        async def ending(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "a")

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            stream = client.stream("1")
            assert (await anext(stream)).text == "a"
            assert isinstance(await error_of(stream), UnavailableError)
            assert (await client.generate("next")).text == "next"

        play(scenario, ending, Peer.answer_all)

    def test_a_call_that_ends_while_nobody_uses_it_is_replaced(self, play):
        async def ending(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "a", end=True)

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            assert (await client.generate("1")).text == "a"
            await until(lambda: not any("many" in t.get_name() for t in asyncio.all_tasks()))
            assert (await client.generate("next")).text == "next"

        play(scenario, ending, Peer.answer_all)

    @pytest.mark.parametrize("task", ["read many answers", "write many requests"])
    def test_a_task_that_somebody_cancels_leaves_no_request_hanging(self, play, task: str):
        async def silent(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "a")
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            stream = client.stream("1")
            await anext(stream)
            (victim,) = (each for each in asyncio.all_tasks() if each.get_name() == task)
            victim.cancel()
            assert isinstance(await error_of(stream), RequestCancelledError)
            await service.peers[0].is_cancelled.wait()
            assert (await client.generate("next")).text == "next"

        play(scenario, silent, Peer.answer_all)

    def test_bytes_that_are_no_answer_fail_the_requests_and_end_the_call(self, tmp_path: Path):
        is_cancelled = asyncio.Event()

        async def garbage(requests: Any, context: Any) -> None:
            await context.write(b"\xff\xff\xff")
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                is_cancelled.set()
                raise

        async def main() -> None:
            server = grpc.aio.server()
            handlers = {"GenerateMany": grpc.stream_stream_rpc_method_handler(garbage)}
            name = "nanovllm.v1.InferenceService"
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
            address = f"unix:{tmp_path}/s"
            server.add_insecure_port(address)
            await server.start()
            async with asyncio.timeout(LIMIT_S), AsyncClient(address, share_call=True) as client:
                assert isinstance(await error_of(client.stream("a")), ServerError)
                await is_cancelled.wait()
            await server.stop(None)

        asyncio.run(main())

    def test_no_server_is_unavailable(self, tmp_path: Path):
        async def main() -> None:
            address = f"unix:{tmp_path}/nobody"
            async with asyncio.timeout(LIMIT_S), AsyncClient(address, share_call=True) as client:
                for _ in range(2):
                    assert isinstance(await error_of(client.stream("a")), UnavailableError)

        asyncio.run(main())


class TestOldCalls:
    def test_an_old_call_takes_no_requests_and_ends_with_those_it_has(self, play, monkeypatch):
        finish = asyncio.Event()

        async def old(peer: Peer) -> None:
            await peer.take(2)
            for start in peer.starts:
                await peer.say(start.number, "begun ")
            await finish.wait()
            await peer.say(peer.starts[0].number, "done", end=True)
            await peer.take(2, 1)

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            first, second = client.stream("1"), client.stream("2")
            assert [(await anext(each)).text for each in (first, second)] == ["begun ", "begun "]
            monkeypatch.setattr(shared_call, "_MAX_AGE_S", 0.0)
            assert (await client.generate("3")).text == "3"
            monkeypatch.setattr(shared_call, "_MAX_AGE_S", 60.0)
            assert [len(peer.starts) for peer in service.peers] == [2, 0]
            finish.set()
            assert await text_of(first) == "done"
            assert not service.peers[0].is_cancelled.is_set()
            second.close()
            await service.peers[0].is_cancelled.wait()
            assert (await client.generate("4")).text == "4"
            assert len(service.peers) == 2

        play(scenario, old, Peer.answer_all, Peer.answer_all)

    def test_closing_the_client_ends_old_calls_too(self, play, monkeypatch):
        async def silent(peer: Peer) -> None:
            await peer.take(1)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            first = client.stream("1")
            await until(lambda: service.peers and service.peers[0].starts)
            monkeypatch.setattr(shared_call, "_MAX_AGE_S", 0.0)
            second = client.stream("2")
            await until(lambda: len(service.peers) == 2)
            await client.close()
            for error in (await error_of(first), await error_of(second)):
                assert isinstance(error, RequestCancelledError)
                assert "the connection was closed" in str(error)
            for peer in service.peers:
                await peer.is_cancelled.wait()

        play(scenario, silent, silent)


class TestResuming:
    def test_requests_go_on_in_another_call_where_they_were(self, play):
        async def breaking(peer: Peer) -> None:
            await peer.take(2)
            first, second = (start.number for start in peer.starts)
            await peer.say(first, "ab", info=True)
            await peer.say(second, "x", info=True)
            await peer.context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

        async def going_on(peer: Peer) -> None:
            await peer.take(2)
            # Each has a key of its own; which of them comes first is up to their pauses.
            for start in peer.starts:
                (received,) = start.request.resume.completions
                rest = {b"ab": "cd", b"x": "yz"}[bytes(received.token_ids)]
                assert received.num_text_chars == len(received.token_ids)
                await peer.say(start.number, rest, end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            params = SamplingParams(max_tokens=9)
            outputs = await asyncio.gather(*(client.generate(text, params) for text in "12"))
            assert [output.text for output in outputs] == ["abcd", "xyz"]
            assert [bytes(output.token_ids) for output in outputs] == [b"abcd", b"xyz"]
            keys = [
                sorted(start.request.resume.key for start in peer.starts) for peer in service.peers
            ]
            assert keys[0] == keys[1]

        play(scenario, breaking, going_on, resume=FAST)

    def test_a_failure_of_one_request_does_not_break_the_call_of_the_others(self, play):
        async def script(peer: Peer) -> None:
            await peer.take(2)
            first, second = (start.number for start in peer.starts)
            await peer.say(first, "a", info=True)
            await peer.fail(first, error_status(code_pb2.UNAVAILABLE, "no executor"))
            await peer.take(3)
            await peer.say(peer.starts[2].number, "b", end=True)
            await peer.say(second, "x", end=True)
            await peer.stay()

        async def scenario(client: AsyncClient, service: Scripted) -> None:
            streams = [client.stream(text) for text in "12"]
            assert await text_of(streams[0]) == "ab"
            assert streams[0].num_resumes == 1
            assert await text_of(streams[1]) == "x"
            assert len(service.peers) == 1

        play(scenario, script, resume=FAST)

    def test_another_server_goes_on(self, tmp_path: Path):
        async def breaking(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "a", info=True)
            await peer.context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

        async def going_on(peer: Peer) -> None:
            await peer.take(1)
            await peer.say(peer.starts[0].number, "b", end=True)
            await peer.stay()

        async def main() -> None:
            first, second = (f"unix:{tmp_path}/{name}" for name in "ab")
            async with (
                asyncio.timeout(LIMIT_S),
                scripted(first, breaking),
                scripted(second, going_on) as other,
                AsyncClient(first, addresses=[second], resume=FAST, share_call=True) as client,
            ):
                assert (await client.generate("1")).text == "ab"
                assert len(other.peers) == 1

        asyncio.run(main())
