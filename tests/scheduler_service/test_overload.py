"""More work than the service can take, seen by its clients: refusals, deadlines, slow readers."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc
from scheduler_service.text.tokenizer import Tokenizer
from tests.scheduler_service.engine_harness import NO_LIMITS
from tests.scheduler_service.serving import (
    LIMIT_S,
    Service,
    failure,
    read_all,
    retry_after_s,
    served,
    until,
)

PROMPT = [0, 1, 1, 2]
# Windows as small as HTTP/2 has them by default, so that little has to be written to fill them.
SMALL_WINDOWS = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535))
# Some 190 bytes for each of 64 x 100 tokens: twenty times the window.
LARGE_ANSWER = {"n": 64, "max_tokens": 100, "logprobs": 20}


@pytest.fixture
def serve(
    tokenizer: Tokenizer, tmp_path: Path
) -> Callable[..., AbstractAsyncContextManager[Service]]:
    """Starts the service with limits of the test's own."""
    return lambda **options: served(tokenizer, f"unix:{tmp_path}/s.sock", **options)


@asynccontextmanager
async def small_window_client(
    service: Service,
) -> AsyncIterator[inference_pb2_grpc.InferenceServiceStub]:
    async with grpc.aio.insecure_channel(service.address, options=SMALL_WINDOWS) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def request(text: str = "", **params) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(**({"ignore_eos": True, "max_tokens": 9} | params))
    if text:
        return pb.GenerateRequest(text=text, sampling_params=sampling)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=PROMPT), sampling_params=sampling)


async def read_rest(call) -> list[pb.GenerateResponse]:
    """What a stream still holds after single reads."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def rejections(service: Service, reason: str) -> float:
    labels = {"model_name": "tiny", "reason": reason}
    name = "nanovllm_admission_rejections_total"
    return service.harness.metrics.registry.get_sample_value(name, labels) or 0.0


def test_a_client_with_too_many_requests_is_refused_until_one_ends(serve):
    async def main() -> None:
        limits = replace(NO_LIMITS, max_requests_per_client=2)
        async with serve(connect=False, admission=limits) as service:
            first, second = (service.stub.Generate(request()) for _ in range(2))
            await until(lambda: service.harness.pool.load.num_waiting == 2)
            error = await failure(service.stub.Generate(request()))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert retry_after_s(error) == 1.0
            assert rejections(service, "client_limit") == 1
            first.cancel()
            await until(lambda: service.harness.pool.load.num_waiting == 1)
            third = service.stub.Generate(request())
            await until(lambda: service.harness.pool.load.num_waiting == 2)
            second.cancel()
            third.cancel()

    asyncio.run(main())


def test_a_queue_that_is_too_slow_is_refused_with_a_hint_and_counted(serve):
    async def main() -> None:
        limits = replace(NO_LIMITS, max_queue_wait_s=None)
        async with serve(admission=limits) as service:
            admission = service.harness.engine.admission
            admission.observe_service_time(20.0)
            service.harness.scheduler.is_full = True
            calls = [service.stub.Generate(request(max_tokens=100)) for _ in range(200)]
            results = await asyncio.gather(*map(read_all, calls), return_exceptions=True)
            refused = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
            assert refused
            assert {error.code() for error in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
            assert all(0.1 <= (retry_after_s(error) or 0) <= 30 for error in refused)
            assert rejections(service, "queue_wait") == len(refused)
            # Whoever was let in has everything.
            for answer in results:
                if not isinstance(answer, BaseException):
                    assert answer[-1].usage.completion_tokens == 100

    asyncio.run(main())


def test_text_that_would_wait_in_vain_is_refused_without_being_kept(serve, slow_tokenizer):
    async def main() -> None:
        async with serve(max_pending_bytes=400) as service:
            encoder = service.encoder
            calls = [service.stub.Generate(request(text="a" * 100)) for _ in range(2)]
            await until(lambda: encoder._pending_bytes > 250)
            error = await failure(service.stub.Generate(request(text="a" * 101)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert retry_after_s(error) == 1.0
            assert rejections(service, "tokenizer_busy") == 1
            slow_tokenizer.set()
            for call in calls:
                assert (await read_all(call))[-1].usage.completion_tokens == 9
            await until(lambda: encoder._pending_bytes == 0)

    asyncio.run(main())


@pytest.mark.parametrize(
    "chat",
    [
        pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="a" * 1000)]),
        pb.ChatMessages(messages=[pb.ChatMessage(role="a" * 1000, content="Hi")]),
        pb.ChatMessages(
            messages=[pb.ChatMessage(role="user", content="Hi")],
            template_kwargs_json='{"x": "%s"}' % ("a" * 1000),
        ),
    ],
    ids=["content", "role", "variables"],
)
def test_every_part_of_a_conversation_counts_as_waiting_text(
    serve, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, chat: pb.ChatMessages
):
    go_on = threading.Event()
    monkeypatch.setattr(tokenizer, "render_chat", lambda *_, **__: go_on.wait(LIMIT_S) and "a")

    async def main() -> None:
        async with serve(max_pending_bytes=1500) as service:
            tokenize = service.stub.Tokenize(pb.TokenizeRequest(chat=chat))
            await until(lambda: service.encoder._pending_bytes > 0)
            error = await failure(service.stub.Tokenize(pb.TokenizeRequest(chat=chat)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            go_on.set()
            await tokenize

    asyncio.run(main())


def test_a_text_that_is_cancelled_while_it_waits_for_a_thread_is_forgotten(serve, slow_tokenizer):
    async def main() -> None:
        async with serve() as service:
            encoder = service.encoder
            calls = [service.stub.Generate(request(text="a" * 100)) for _ in range(20)]
            await until(lambda: len(service.harness.engine._reservations) == 20)
            for call in calls:
                call.cancel()
            await until(lambda: not service.harness.engine._reservations)
            # Two are with the threads, and nothing else is queued behind them.
            assert encoder._threads._work_queue.qsize() == 0
            slow_tokenizer.set()
            await until(lambda: encoder._pending_bytes == 0)
            assert (await read_all(service.stub.Generate(request(text="a"))))[-1].usage

    asyncio.run(main())


def test_a_text_that_is_longer_than_the_model_never_reaches_a_thread(serve, slow_tokenizer):
    async def main() -> None:
        async with serve() as service:
            error = await failure(service.stub.Generate(request(text="a" * 1_000_000)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert service.encoder._pending_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("preempted", [False, True])
def test_a_queued_request_leaves_the_queue_when_its_deadline_passes(serve, preempted: bool):
    async def main() -> None:
        async with serve() as service:
            harness = service.harness
            running = service.stub.Generate(request(max_tokens=100, n=8))
            await until(lambda: harness.pool.load.num_running == 8)
            if preempted:
                # It waits again with its tokens, and no executor comes before its deadline.
                harness.lose_executor()
            late = service.stub.Generate(request(max_tokens=100), timeout=0.2)
            if not preempted:
                harness.lose_executor()
            await until(lambda: harness.pool.load.num_waiting == 9)
            error = await failure(late)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: harness.pool.load.num_waiting == 8)
            running.cancel()

    asyncio.run(main())


def test_a_request_that_ran_and_was_preempted_leaves_at_its_deadline(serve):
    async def main() -> None:
        async with serve() as service:
            harness = service.harness
            late = service.stub.Generate(request(max_tokens=120), timeout=0.5)
            await until(lambda: harness.pool.load.num_running == 1)
            harness.lose_executor()
            await until(lambda: harness.pool.load.num_waiting == 1)
            assert (await failure(late)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until(lambda: harness.pool.load.num_waiting == 0)

    asyncio.run(main())


def test_a_client_that_stops_reading_loses_its_request_and_is_told_when_it_reads(serve):
    async def main() -> None:
        async with (
            serve(write_timeout_s=0.3) as service,
            small_window_client(service) as slow,
        ):
            call = slow.Generate(request(**LARGE_ANSWER))
            first = await call.read()
            assert first.token_ids
            await until(lambda: not service.harness.engine._requests)
            error = await failure(read_rest(call))
            assert error.code() is grpc.StatusCode.ABORTED
            assert "read nothing for 0.3 s" in error.details()

    asyncio.run(main())


def test_others_are_served_while_a_client_does_not_read(serve):
    async def main() -> None:
        async with serve() as service, small_window_client(service) as slow:
            stalled = slow.Generate(request(**LARGE_ANSWER))
            await stalled.read()
            for _ in range(3):
                answer = await read_all(service.stub.Generate(request(n=2, max_tokens=100)))
                assert sum(len(response.token_ids) for response in answer) == 200
            requests = service.harness.engine._requests.values()
            assert len(requests) == 1, "the stalled request waits for its reader"
            rest = await read_rest(stalled)
            finished = [r.index for r in rest if r.finish_reason == pb.FINISH_REASON_LENGTH]
            assert len(finished) >= 63

    asyncio.run(main())


def test_an_unread_answer_is_one_pending_delta_for_each_completion(serve):
    async def main() -> None:
        async with serve() as service, small_window_client(service) as slow:
            stalled = slow.Generate(request(**LARGE_ANSWER))
            first = await stalled.read()
            scheduler = service.harness.scheduler
            await until(lambda: scheduler.num_running == scheduler.num_waiting == 0)
            responses = [first, *await read_rest(stalled)]
            for index in range(64):
                mine = [r for r in responses if r.index == index]
                assert sum(len(r.token_ids) for r in mine) == 100
                assert sum(len(r.logprobs) for r in mine) == 100
            # The window holds a few; what is generated behind it comes in one piece.
            assert len(responses) < 64 * 100 / 4

    asyncio.run(main())
