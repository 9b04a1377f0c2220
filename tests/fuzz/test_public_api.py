"""Any request gets a proper answer: a terminal message, or a status that says what to change."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.text.tokenizer import Tokenizer
from tests.fuzz.messages import PROPER, mutated, random_message, random_request
from tests.scheduler_service.serving import Service, served

LIMIT_S = 30
UNARY = {
    "Tokenize": pb.TokenizeRequest,
    "Detokenize": pb.DetokenizeRequest,
    "Abort": pb.AbortRequest,
    "GetModelInfo": pb.GetModelInfoRequest,
    "GetServerStatus": pb.GetServerStatusRequest,
}


Run = Callable[[Callable[[Service], Coroutine[Any, Any, None]]], None]


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a scenario against one service for all examples, and checks its books afterwards."""
    address = f"unix:{tmp_path_factory.mktemp('fuzz') / 's.sock'}"
    with asyncio.Runner() as runner:
        serving = served(tokenizer, address)
        service = runner.run(serving.__aenter__())

        async def main(scenario: Callable[[Service], Coroutine[Any, Any, None]]) -> None:
            await scenario(service)
            await check_books(service)

        yield lambda scenario: runner.run(main(scenario))
        runner.run(serving.__aexit__(None, None, None))


async def status_of(call: Awaitable[Any]) -> grpc.StatusCode:
    """How a call ends; fails the test if that is nobody's fault but the server's."""
    try:
        async with asyncio.timeout(LIMIT_S):
            await call
    except grpc.aio.AioRpcError as error:
        code, reason = error.code(), error.details()
    else:
        return grpc.StatusCode.OK
    assert code is grpc.StatusCode.OK or code in PROPER, f"{code}: {reason}"
    assert reason, f"{code} without a reason"
    return code


async def generate(
    service: Service, request: pb.GenerateRequest, rng: random.Random
) -> grpc.StatusCode:
    """One request whose client reads all, or gives up at some point."""
    timeout_s = rng.choice((None, None, None, 0.0, 0.01))
    num_reads = rng.choice((None, None, None, 0, 1))
    call = service.stub.Generate(request, timeout=timeout_s)

    async def read() -> None:
        ended: set[int] = set()
        count = 0
        async for response in call:
            assert response.index not in ended, "a message after the terminal one"
            if response.finish_reason:
                ended.add(response.index)
            count += 1
            if count == num_reads:
                call.cancel()
                return
        n = request.sampling_params.n if request.sampling_params.HasField("n") else 1
        assert len(ended) == n, "a completion without a terminal message"

    if num_reads == 0:
        call.cancel()
    try:
        return await status_of(read())
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED


@settings(max_examples=25)
@given(rng=st.randoms(use_true_random=False))
def test_any_generate_request_is_served_or_refused_by_name(run: Run, rng):
    async def scenario(service: Service) -> None:
        requests = [random_request(rng) for _ in range(8)]
        await asyncio.gather(*(generate(service, request, rng) for request in requests))

    run(scenario)


async def generate_many(
    service: Service, requests: list[pb.GenerateRequest], rng: random.Random
) -> None:
    """Requests that share a call and end by themselves, by their limit or because of the client."""
    numbers = {rng.randrange(2**64): request for request in requests}
    starts = [
        pb.NumberedRequest(
            number=number,
            request=request,
            timeout_s=rng.choice((None, None, None, 0.0, -1.0, 0.01, float("nan"), float("inf"))),
            metadata=rng.choice((None, {"traceparent": "nonsense"})),
        )
        for number, request in numbers.items()
    ]
    cancelled = {number for number in numbers if rng.random() < 0.2}
    call = service.stub.GenerateMany()
    half = rng.randrange(len(starts) + 1)
    for message in (
        pb.GenerateManyRequest(starts=starts[:half], cancels=[rng.randrange(2**64)]),
        pb.GenerateManyRequest(starts=starts[half:], cancels=cancelled),
        pb.GenerateManyRequest(cancels=cancelled),
    ):
        await call.write(message)
    await call.done_writing()
    ended: set[int] = set()
    failed: set[int] = set()
    finished: dict[int, set[int]] = {number: set() for number in numbers}

    async def read() -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            for item in message.responses:
                assert item.number not in ended, "a message after the last one"
                if item.is_last:
                    ended.add(item.number)
                if item.HasField("failure"):
                    assert item.is_last
                    check_failure(item.failure)
                    failed.add(item.number)
                elif item.response.finish_reason:
                    finished[item.number].add(item.response.index)

    assert await status_of(read()) is grpc.StatusCode.OK
    assert ended >= numbers.keys() - cancelled, "a request without an end"
    for number in ended - failed:
        params = numbers[number].sampling_params
        n = params.n if params.HasField("n") else 1
        assert len(finished[number]) == n, "a completion without a terminal message"


def check_failure(failure: pb.RequestFailure) -> None:
    """Fails the test if a failure is nobody's fault but the server's."""
    codes = {code.value[0]: code for code in PROPER}
    assert failure.code in codes, f"{failure.code}: {failure.message}"
    assert failure.message, f"{failure.code} without a reason"


@settings(max_examples=25)
@given(rng=st.randoms(use_true_random=False))
def test_any_requests_of_one_call_are_served_or_refused_by_name_each(run: Run, rng):
    async def scenario(service: Service) -> None:
        calls = [[random_request(rng) for _ in range(8)] for _ in range(2)]
        await asyncio.gather(*(generate_many(service, requests, rng) for requests in calls))

    run(scenario)


@settings(max_examples=25)
@given(rng=st.randoms(use_true_random=False), wildness=st.sampled_from([0.0, 0.1, 1.0]))
def test_any_unary_request_is_answered_or_refused_by_name(run: Run, rng, wildness):
    async def scenario(service: Service) -> None:
        for name, kind in UNARY.items():
            request = random_message(kind, rng, wildness)
            await status_of(getattr(service.stub, name)(request))

    run(scenario)


@settings(max_examples=25)
@given(rng=st.randoms(use_true_random=False), noise=st.binary(max_size=40))
def test_bytes_that_are_no_request_are_refused(run: Run, rng, noise: bytes):
    async def scenario(service: Service) -> None:
        path = "/nanovllm.v1.InferenceService/"
        async with grpc.aio.insecure_channel(service.address) as channel:
            for sent in (noise, mutated(random_request(rng).SerializeToString(), rng)):
                await status_of(read_raw(channel.unary_stream(path + "Generate")(sent)))
                many = channel.stream_stream(path + "GenerateMany")
                numbered = pb.NumberedRequest(number=1).SerializeToString() + b"\x12"
                for bytes_sent in (sent, numbered + sent, mutated(many_of(rng), rng)):
                    await status_of(read_raw(many(iter([bytes_sent]))))
                for name in UNARY:
                    await status_of(channel.unary_unary(path + name)(sent))

    run(scenario)


def many_of(rng: random.Random) -> bytes:
    """A message of GenerateMany."""
    starts = [pb.NumberedRequest(number=i, request=random_request(rng)) for i in range(3)]
    return pb.GenerateManyRequest(starts=starts, cancels=[1]).SerializeToString()


async def read_raw(call: Any) -> None:
    async for _ in call:
        pass


async def check_books(service: Service) -> None:
    """Once all requests are over, every block is free or cached."""
    harness = service.harness
    async with asyncio.timeout(LIMIT_S):
        await harness.engine.wait_until_idle()
    harness.scheduler.verify()
    blocks = harness.scheduler.blocks
    assert blocks is not None
    assert blocks.num_free + blocks.num_cached == blocks.num_blocks
