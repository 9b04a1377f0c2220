"""Many requests over one call: each fares as it would in a call of its own."""

import asyncio
import queue
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import grpc
import pytest

from nanovllm import (
    AsyncClient,
    Chat,
    Client,
    DeadlineExceededError,
    DuplicateRequestError,
    FinishReason,
    InvalidRequestError,
    LocalServices,
    NanovllmError,
    RequestCancelledError,
    RequestOutput,
    SamplingParams,
)
from nanovllm.aio import AsyncDeltaStream
from nanovllm.requests import Prompt, generate_request
from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.support import (
    LIMIT_S,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    CallError,
    Metrics,
    greedy,
    random_prompt,
    wait_until,
    wait_until_idle,
)

PROMPT = random_prompt(30, seed=90)
#: Far longer than any test takes.
ENDLESS = greedy(MAX_MODEL_LEN - len(PROMPT))
GENERATE_MANY = "/nanovllm.v1.InferenceService/GenerateMany"
NAN = float("nan")


def sharing(address: str, scenario: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    """Runs a scenario with a client whose requests share one call."""

    async def main() -> Any:
        async with asyncio.timeout(2 * LIMIT_S), AsyncClient(address, share_call=True) as client:
            return await scenario(client)

    return asyncio.run(main())


async def first_tokens(stream: AsyncDeltaStream, count: int = 1) -> list[int]:
    """Reads until a stream has brought some tokens."""
    token_ids: list[int] = []
    while len(token_ids) < count:
        token_ids += (await anext(stream)).token_ids
    return token_ids


async def rest_of(stream: AsyncDeltaStream) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


async def until_idle(client: AsyncClient) -> None:
    """Waits until nothing runs or waits."""
    while True:
        status = await client.server_status()
        if status.num_running == status.num_waiting == 0:
            return
        await asyncio.sleep(0.005)


class TestParity:
    @staticmethod
    def requests(client: Client) -> list[tuple[Prompt, SamplingParams]]:
        text = client.generate(PROMPT, greedy(40)).text
        seeded = SamplingParams(temperature=2.0, seed=7, max_tokens=20, n=3, ignore_eos=True)
        return [
            *((random_prompt(1 + 13 * i, seed=100 + i), greedy(5 + 3 * i)) for i in range(12)),
            (PROMPT, greedy(20, n=2)),
            (PROMPT, greedy(20, logprobs=3)),
            (PROMPT, greedy(40, stop=(text[8:11],))),
            (PROMPT, greedy(40, stop=(text[8:11],), include_stop_str_in_output=True, n=2)),
            (PROMPT, greedy(10, detokenize=False)),
            (PROMPT, seeded),
            ("a text with \u00e9, \u4e16 and \U0001f600", greedy(30)),
            (Chat([{"role": "user", "content": "hello"}]), greedy(30)),
            (random_prompt(600, seed=91), greedy(4, logprobs=0)),
        ]

    def test_twenty_requests_at_once_get_what_calls_of_their_own_do(self, client: Client) -> None:
        requests = self.requests(client)
        assert len(requests) > 20
        alone = [client.generate(prompt, params) for prompt, params in requests]

        async def scenario(shared: AsyncClient) -> list[RequestOutput]:
            return await asyncio.gather(
                *(shared.generate(prompt, params) for prompt, params in requests)
            )

        together = sharing(client.address, scenario)
        assert any(output.completions[0].stop_reason for output in alone), "no stop string matched"
        for ours, expected in zip(together, alone, strict=True):
            for mine, other in zip(ours.completions, expected.completions, strict=True):
                assert mine.token_ids == other.token_ids
                assert mine.text == other.text
                assert mine.finish_reason is other.finish_reason
                assert mine.stop_reason == other.stop_reason
                assert (mine.logprobs is None) == (other.logprobs is None)
                for entry, reference in zip(mine.logprobs or (), other.logprobs or (), strict=True):
                    assert entry.logprob == pytest.approx(reference.logprob, abs=1e-4)
                    assert entry.top_token_ids == reference.top_token_ids
            assert ours.num_prompt_tokens == expected.num_prompt_tokens

    def test_many_times_more_requests_than_slots_all_finish(self, client: Client) -> None:
        prompts = [random_prompt(1 + i % 40, seed=200 + i) for i in range(30 * MAX_NUM_SEQS)]

        async def scenario(shared: AsyncClient) -> list[RequestOutput]:
            return await asyncio.gather(
                *(shared.generate(prompt, greedy(1 + i % 9)) for i, prompt in enumerate(prompts))
            )

        outputs = sharing(client.address, scenario)
        assert [len(output.token_ids) for output in outputs] == [
            1 + i % 9 for i in range(len(prompts))
        ]
        for index in range(0, len(prompts), 40):
            expected = client.generate(prompts[index], greedy(1 + index % 9)).token_ids
            assert outputs[index].token_ids == expected

    def test_each_request_counts_in_the_metrics(
        self, client: Client, services: LocalServices
    ) -> None:
        def finished() -> float:
            return Metrics(services.scheduler.metrics_url)["requests_total"]

        before = finished()

        async def scenario(shared: AsyncClient) -> None:
            await asyncio.gather(*(shared.generate(PROMPT, greedy(2)) for _ in range(5)))

        sharing(client.address, scenario)
        assert finished() - before == 5


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "params", "field"),
        [
            (PROMPT, SamplingParams(max_tokens=2, top_p=2.0), "sampling_params.top_p"),
            ([1] * (MAX_MODEL_LEN + 1), greedy(1), "token_ids"),
            ("", greedy(1), "text"),
            ("x " * 100_000, greedy(1), "text"),
        ],
    )
    def test_one_invalid_request_is_refused_by_name_beside_good_ones(
        self, client: Client, prompt: Prompt, params: SamplingParams, field: str
    ) -> None:
        expected = client.generate(PROMPT, greedy(20)).token_ids

        async def scenario(shared: AsyncClient) -> None:
            good = [shared.stream(PROMPT, greedy(20)) for _ in range(2)]
            bad = shared.stream(prompt, params)
            later = shared.stream(PROMPT, greedy(20))
            with pytest.raises(InvalidRequestError) as caught:
                await rest_of(bad)
            assert caught.value.fields == (field,)
            with pytest.raises(InvalidRequestError) as alone:
                await asyncio.to_thread(client.generate, prompt, params)
            assert str(caught.value) == str(alone.value)
            for stream in (*good, later):
                assert await rest_of(stream) == expected

        sharing(client.address, scenario)

    def test_the_id_of_a_live_request_is_refused(self, client: Client) -> None:
        async def scenario(shared: AsyncClient) -> None:
            async with shared.stream(PROMPT, ENDLESS, request_id="one") as stream:
                await first_tokens(stream)
                with pytest.raises(DuplicateRequestError, match="'one'"):
                    await shared.generate(PROMPT, greedy(1), request_id="one")
                await first_tokens(stream)

        sharing(client.address, scenario)


class TestEndings:
    def test_a_cancelled_request_frees_everything_while_another_goes_on(
        self, client: Client
    ) -> None:
        expected = client.generate(PROMPT, greedy(400)).token_ids

        async def scenario(shared: AsyncClient) -> None:
            kept = shared.stream(PROMPT, greedy(400))
            token_ids = await first_tokens(kept)
            doomed = shared.stream(random_prompt(200, seed=92), greedy(3000, n=3))
            await first_tokens(doomed)
            doomed.close()
            with pytest.raises(RequestCancelledError):
                await anext(doomed)
            while (await shared.server_status()).num_running > 1:
                await asyncio.sleep(0.005)
            token_ids += await rest_of(kept)
            assert token_ids == expected
            await until_idle(shared)

        sharing(client.address, scenario)
        wait_until_idle(client)

    def test_a_request_that_is_closed_at_once_does_not_run(self, client: Client) -> None:
        async def scenario(shared: AsyncClient) -> None:
            shared.stream(PROMPT, ENDLESS).close()
            await shared.generate(PROMPT, greedy(2))
            await asyncio.wait_for(until_idle(shared), LIMIT_S / 6)

        sharing(client.address, scenario)

    def test_cancelling_a_queued_request_takes_it_out_of_the_queue(self, client: Client) -> None:
        async def scenario(shared: AsyncClient) -> None:
            async with shared.stream(PROMPT, greedy(MAX_MODEL_LEN - 30, n=MAX_NUM_SEQS)) as full:
                await first_tokens(full)
                queued = shared.stream(PROMPT, ENDLESS)
                while not (await shared.server_status()).num_waiting:
                    await asyncio.sleep(0.005)
                queued.close()
                while (await shared.server_status()).num_waiting:
                    await asyncio.sleep(0.005)
                await first_tokens(full)

        sharing(client.address, scenario)

    def test_the_timeout_of_a_request_is_its_own(self, client: Client) -> None:
        async def scenario(shared: AsyncClient) -> None:
            unlimited = shared.stream(PROMPT, ENDLESS)
            await first_tokens(unlimited)
            late = shared.stream(PROMPT, ENDLESS, timeout_s=0.3)
            assert await first_tokens(late)
            with pytest.raises(DeadlineExceededError):
                await rest_of(late)
            with pytest.raises(DeadlineExceededError):
                await shared.generate(PROMPT, ENDLESS, timeout_s=0.0)
            while (await shared.server_status()).num_running > 1:
                await asyncio.sleep(0.005)
            await first_tokens(unlimited)
            unlimited.close()

        sharing(client.address, scenario)

    def test_abort_ends_every_index_with_one_terminal_message(self, client: Client) -> None:
        async def scenario(shared: AsyncClient) -> None:
            params = greedy(MAX_MODEL_LEN - 30, n=3)
            stream = shared.stream(PROMPT, params, request_id="three")
            other = shared.stream(PROMPT, greedy(20))
            await first_tokens(stream)
            assert await shared.abort("three")
            last = [delta async for delta in stream if delta.finish_reason is not None]
            assert sorted(delta.index for delta in last) == [0, 1, 2]
            assert {delta.finish_reason for delta in last} == {FinishReason.ABORT}
            assert all(delta.usage is not None for delta in last)
            assert len(await rest_of(other)) == 20
            assert not await shared.abort("three")

        sharing(client.address, scenario)

    def test_closing_the_client_frees_everything(self, client: Client) -> None:
        async def scenario(shared: AsyncClient) -> list[AsyncDeltaStream]:
            streams = [shared.stream(PROMPT, ENDLESS) for _ in range(MAX_NUM_SEQS + 3)]
            await first_tokens(streams[0])
            reading = asyncio.create_task(rest_of(streams[1]))
            await shared.close()
            with pytest.raises(RequestCancelledError):
                await reading
            return streams

        # Kept, so that it is not their end that cancels the requests.
        streams = sharing(client.address, scenario)
        wait_until_idle(client)
        assert streams

    def test_requests_of_every_fate_leave_nothing(self, client: Client) -> None:
        expected = client.generate(PROMPT, greedy(60)).token_ids

        async def visit(shared: AsyncClient, index: int) -> None:
            fate = ("stay", "close", "abort", "cancel", "deadline", "invalid")[index % 6]
            params = greedy(60, top_p=2.0) if fate == "invalid" else greedy(60)
            timeout_s = 0.001 * index if fate == "deadline" else None
            stream = shared.stream(PROMPT, params, request_id=f"v{index}", timeout_s=timeout_s)
            reading = asyncio.create_task(rest_of(stream))
            if fate in ("close", "abort", "cancel"):
                await asyncio.wait([reading], timeout=0.003 * index)
            if fate == "close":
                stream.close()
            elif fate == "abort":
                await shared.abort(f"v{index}")
            elif fate == "cancel":
                reading.cancel()
            (result,) = await asyncio.gather(reading, return_exceptions=True)
            if fate == "stay":
                assert result == expected
            elif isinstance(result, list):
                assert result == expected[: len(result)]
            else:
                assert isinstance(result, (NanovllmError, asyncio.CancelledError))

        async def scenario(shared: AsyncClient) -> None:
            await asyncio.gather(*(visit(shared, index) for index in range(120)))

        sharing(client.address, scenario)
        wait_until_idle(client)


class RawCall:
    """A call of GenerateMany whose messages the test sends one by one."""

    def __init__(self, method: Callable[..., Any], **options: Any) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.call = method(iter(self._messages.get, None), timeout=2 * LIMIT_S, **options)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._messages.put(message)

    def close(self) -> None:
        self._messages.put(None)

    def rest(self) -> dict[int, list[pb.NumberedResponse]]:
        """What comes of each request until the call ends."""
        return by_number(item for message in self.call for item in message.responses)

    def error(self) -> CallError:
        """The error that the call must end in."""
        with pytest.raises(grpc.RpcError) as caught:
            list(self.call)
        self.close()
        return CallError.of(caught.value)


def by_number(items: Iterable[pb.NumberedResponse]) -> dict[int, list[pb.NumberedResponse]]:
    responses: dict[int, list[pb.NumberedResponse]] = defaultdict(list)
    for item in items:
        responses[item.number].append(item)
    return responses


def starting(
    *numbers: int, params: SamplingParams | None = None, **fields: Any
) -> pb.GenerateManyRequest:
    request = generate_request(PROMPT, params or greedy(5))
    request.request_id = ""
    return pb.GenerateManyRequest(
        starts=[pb.NumberedRequest(number=number, request=request, **fields) for number in numbers]
    )


def tokens_of(items: list[pb.NumberedResponse]) -> list[int]:
    assert [item.is_last for item in items] == [False] * (len(items) - 1) + [True]
    return [token_id for item in items for token_id in item.response.token_ids]


class TestRawCalls:
    @pytest.fixture
    def stub(self, services: LocalServices) -> Iterator[pb_grpc.InferenceServiceStub]:
        with grpc.insecure_channel(services.address) as channel:
            yield pb_grpc.InferenceServiceStub(channel)

    def test_numbers_are_the_clients_choice_and_free_again_after_the_end(
        self, stub: pb_grpc.InferenceServiceStub, client: Client
    ) -> None:
        expected = client.generate(PROMPT, greedy(5)).token_ids
        raw = RawCall(stub.GenerateMany)
        raw.send(starting(0, 2**64 - 1))
        seen: list[pb.NumberedResponse] = []
        while sum(item.is_last for item in seen) < 2:
            seen += next(raw.call).responses
        assert {number: tokens_of(items) for number, items in by_number(seen).items()} == {
            0: expected,
            2**64 - 1: expected,
        }
        raw.send(starting(0))
        raw.close()
        assert tokens_of(raw.rest()[0]) == expected

    def test_the_call_of_a_client_without_requests_ends_well(
        self, stub: pb_grpc.InferenceServiceStub
    ) -> None:
        raw = RawCall(stub.GenerateMany)
        raw.close()
        assert raw.rest() == {}
        assert raw.call.code() is grpc.StatusCode.OK

    def test_a_live_number_that_is_used_again_ends_the_call_and_all_its_requests(
        self, stub: pb_grpc.InferenceServiceStub, client: Client
    ) -> None:
        raw = RawCall(stub.GenerateMany)
        raw.send(starting(3, 7, params=ENDLESS))
        next(raw.call)
        raw.send(starting(7))
        error = raw.error()
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.bad_fields == ("starts.number",)
        assert "7" in error.message
        wait_until_idle(client)

    @pytest.mark.parametrize("timeout_s", [0.0, -1.0, NAN, -float("inf")])
    def test_a_limit_that_is_none_is_refused_by_name(
        self, stub: pb_grpc.InferenceServiceStub, client: Client, timeout_s: float
    ) -> None:
        raw = RawCall(stub.GenerateMany)
        raw.send(starting(1, timeout_s=timeout_s), starting(2))
        raw.close()
        responses = raw.rest()
        (refused,) = responses[1]
        assert refused.is_last
        assert refused.failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        assert refused.failure.message.startswith("starts.timeout_s: ")
        assert len(tokens_of(responses[2])) == 5

    @pytest.mark.parametrize("timeout_s", [float("inf"), 1e300])
    def test_a_limit_may_be_as_long_as_one_likes(
        self, stub: pb_grpc.InferenceServiceStub, client: Client, timeout_s: float
    ) -> None:
        raw = RawCall(stub.GenerateMany)
        raw.send(starting(1, timeout_s=timeout_s))
        raw.close()
        assert len(tokens_of(raw.rest()[1])) == 5

    def test_cancels_of_unknown_and_ended_requests_are_ignored(
        self, stub: pb_grpc.InferenceServiceStub, client: Client
    ) -> None:
        raw = RawCall(stub.GenerateMany)
        raw.send(pb.GenerateManyRequest(cancels=[5, 2**64 - 1]), starting(5))
        responses: list[pb.NumberedResponse] = []
        while not responses or not responses[-1].is_last:
            responses += next(raw.call).responses
        assert len(tokens_of(responses)) == 5
        raw.send(pb.GenerateManyRequest(cancels=[5, 5]), starting(6))
        raw.close()
        assert len(tokens_of(raw.rest()[6])) == 5

    def test_a_cancelled_number_is_not_heard_of_again(
        self, stub: pb_grpc.InferenceServiceStub, client: Client
    ) -> None:
        raw = RawCall(stub.GenerateMany)
        raw.send(starting(1, params=ENDLESS))
        next(raw.call)
        raw.send(pb.GenerateManyRequest(cancels=[1]))
        wait_until_idle(client)
        raw.send(starting(2))
        raw.close()
        responses = raw.rest()
        assert not any(item.is_last for item in responses.pop(1, []))
        assert len(tokens_of(responses[2])) == 5

    def test_a_request_without_a_prompt_is_refused_and_messages_may_be_empty(
        self, stub: pb_grpc.InferenceServiceStub, client: Client
    ) -> None:
        raw = RawCall(stub.GenerateMany)
        raw.send(
            pb.GenerateManyRequest(),
            pb.GenerateManyRequest(starts=[pb.NumberedRequest()]),
            starting(1),
        )
        raw.close()
        responses = raw.rest()
        assert responses[0][0].failure.message.startswith("prompt: ")
        assert len(tokens_of(responses[1])) == 5

    def test_cancelling_the_call_frees_everything(
        self, stub: pb_grpc.InferenceServiceStub, client: Client
    ) -> None:
        raw = RawCall(stub.GenerateMany)
        raw.send(starting(*range(MAX_NUM_SEQS + 4), params=ENDLESS))
        next(raw.call)
        wait_until(
            lambda: client.server_status().num_running == MAX_NUM_SEQS, "all slots are taken"
        )
        raw.call.cancel()
        raw.close()
        wait_until_idle(client)

    def test_a_message_that_is_none_ends_the_call_and_all_its_requests(
        self, services: LocalServices, client: Client
    ) -> None:
        with grpc.insecure_channel(services.address) as channel:
            raw = RawCall(channel.stream_stream(GENERATE_MANY))
            raw.send(starting(1, params=ENDLESS).SerializeToString())
            next(raw.call)
            raw.send(b"\xff\xff\xff")
            error = raw.error()
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.message == "the request is no valid message of this method"
        wait_until_idle(client)
