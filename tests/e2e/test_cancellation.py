"""Requests that end early: whoever ends them, they own nothing afterwards."""

import asyncio
from collections.abc import Iterator

import pytest

from nanovllm import (
    AsyncClient,
    Client,
    DeadlineExceededError,
    DeltaStream,
    DuplicateRequestError,
    FinishReason,
    InvalidRequestError,
    RequestCancelledError,
)
from tests.e2e.support import (
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    greedy,
    random_prompt,
    wait_until,
    wait_until_idle,
)

#: Freeing everything is a matter of one iteration; the rest is for slow machines.
PROMPT_LIMIT_S = 5.0
PROMPT = random_prompt(30, seed=60)
#: Far longer than any test takes.
ENDLESS = greedy(MAX_MODEL_LEN - len(PROMPT))


def first_tokens(stream: DeltaStream, count: int = 1) -> list[int]:
    """Reads until a stream has brought some tokens."""
    token_ids: list[int] = []
    for delta in stream:
        token_ids += delta.token_ids
        if len(token_ids) >= count:
            break
    return token_ids


@pytest.fixture
def full(client: Client) -> Iterator[Client]:
    """A client of a server whose slots are all taken."""
    with client.stream(PROMPT, greedy(MAX_MODEL_LEN - 30, n=MAX_NUM_SEQS)):
        wait_until(
            lambda: client.server_status().num_running == MAX_NUM_SEQS, "all slots are taken"
        )
        yield client


class TestCancellation:
    def test_cancelled_call_frees_slot_and_blocks(self, client: Client) -> None:
        stream = client.stream(PROMPT, ENDLESS)
        first_tokens(stream)
        assert client.server_status().num_running == 1
        stream.close()
        with pytest.raises(RequestCancelledError):
            next(stream)
        wait_until_idle(client, PROMPT_LIMIT_S)

    def test_leaving_the_loop_early_frees_slot_and_blocks(self, client: Client) -> None:
        with client.stream(PROMPT, ENDLESS) as stream:
            assert len(first_tokens(stream, 10)) >= 10
        wait_until_idle(client, PROMPT_LIMIT_S)

    def test_dropping_the_stream_frees_slot_and_blocks(self, client: Client) -> None:
        stream = client.stream(PROMPT, ENDLESS)
        first_tokens(stream)
        del stream
        wait_until_idle(client, PROMPT_LIMIT_S)

    def test_closing_the_connection_frees_slot_and_blocks(self, client: Client) -> None:
        other = Client(client.address)
        stream = other.stream(PROMPT, ENDLESS)
        first_tokens(stream)
        other.close()
        wait_until_idle(client, PROMPT_LIMIT_S)

    def test_cancelling_the_task_of_an_asyncio_client_frees_slot_and_blocks(
        self, client: Client
    ) -> None:
        async def generate_and_cancel() -> None:
            async with AsyncClient(client.address) as other:
                started = asyncio.Event()

                async def generate() -> None:
                    async with other.stream(PROMPT, ENDLESS) as stream:
                        async for _ in stream:
                            started.set()

                task = asyncio.create_task(generate())
                await started.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                while (await other.server_status()).num_running:
                    await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(generate_and_cancel(), PROMPT_LIMIT_S))

    def test_cancelled_while_queued_it_leaves_the_queue(self, full: Client) -> None:
        stream = full.stream(PROMPT, ENDLESS)
        wait_until(lambda: full.server_status().num_waiting == 1, "the request is queued")
        stream.close()
        wait_until(
            lambda: full.server_status().num_waiting == 0, "the queue is empty", PROMPT_LIMIT_S
        )

    def test_cancelled_during_prefill_it_frees_slot_and_blocks(self, client: Client) -> None:
        # 64 iterations of prefill; nothing of it is cached yet.
        stream = client.stream(random_prompt(4000, seed=61), greedy(10))
        wait_until(lambda: client.server_status().num_running == 1, "the request is admitted")
        stream.close()
        wait_until_idle(client, PROMPT_LIMIT_S)

    def test_others_go_on_undisturbed(self, client: Client) -> None:
        expected = client.generate(PROMPT, greedy(200)).token_ids
        with client.stream(PROMPT, greedy(200)) as kept:
            token_ids = first_tokens(kept)
            for _ in range(5):
                with client.stream(random_prompt(50, seed=62), ENDLESS) as doomed:
                    first_tokens(doomed)
            token_ids += [token_id for delta in kept for token_id in delta.token_ids]
        assert token_ids == expected


class TestDeadlines:
    def test_deadline_that_passes_in_the_queue_ends_the_request(self, full: Client) -> None:
        with pytest.raises(DeadlineExceededError):
            full.generate(PROMPT, greedy(1), timeout_s=0.3)
        wait_until(
            lambda: full.server_status().num_waiting == 0, "the queue is empty", PROMPT_LIMIT_S
        )

    def test_deadline_that_passes_while_decoding_ends_the_request(self, client: Client) -> None:
        stream = client.stream(PROMPT, ENDLESS, timeout_s=0.5)
        token_ids = first_tokens(stream)
        with pytest.raises(DeadlineExceededError):
            token_ids += first_tokens(stream, MAX_MODEL_LEN)
        assert token_ids
        wait_until_idle(client, PROMPT_LIMIT_S)

    def test_deadline_in_the_past_costs_nothing(self, client: Client) -> None:
        with pytest.raises(DeadlineExceededError):
            client.generate(PROMPT, ENDLESS, timeout_s=0.0)
        wait_until_idle(client, PROMPT_LIMIT_S)


class TestAbort:
    def test_abort_ends_every_index_with_one_terminal_message(self, client: Client) -> None:
        stream = client.stream(PROMPT, greedy(MAX_MODEL_LEN - 30, n=3), request_id="three")
        first_tokens(stream)
        assert client.abort("three")
        last = [delta for delta in stream if delta.finish_reason is not None]
        assert sorted(delta.index for delta in last) == [0, 1, 2]
        assert {delta.finish_reason for delta in last} == {FinishReason.ABORT}
        assert all(delta.usage is not None and delta.stop_reason is None for delta in last)

    def test_aborted_request_returns_what_it_has_generated(self, client: Client) -> None:
        expected = client.generate(PROMPT, greedy(300)).token_ids
        stream = client.stream(PROMPT, greedy(300), request_id="partly")
        token_ids = first_tokens(stream, 20)
        client.abort("partly")
        deltas = list(stream)
        token_ids += [token_id for delta in deltas for token_id in delta.token_ids]
        usage = deltas[-1].usage
        assert usage is not None
        assert usage.completion_tokens == len(token_ids)
        assert token_ids == expected[: len(token_ids)]

    def test_abort_in_the_queue_ends_the_request(self, full: Client) -> None:
        stream = full.stream(PROMPT, ENDLESS, request_id="queued")
        wait_until(lambda: full.server_status().num_waiting == 1, "the request is queued")
        assert full.abort("queued")
        (delta,) = stream
        assert delta.finish_reason is FinishReason.ABORT
        assert delta.token_ids == ()

    def test_abort_of_an_unknown_id_finds_nothing(self, client: Client) -> None:
        assert not client.abort("nobody")

    def test_abort_of_a_finished_request_finds_nothing(self, client: Client) -> None:
        client.generate(PROMPT, greedy(1), request_id="done")
        assert not client.abort("done")

    def test_abort_without_an_id_is_refused(self, client: Client) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            client.abort("")
        assert caught.value.fields == ("request_id",)


class TestRequestIds:
    def test_id_of_a_live_request_is_refused(self, client: Client) -> None:
        with client.stream(PROMPT, ENDLESS, request_id="one") as stream:
            first_tokens(stream)
            with pytest.raises(DuplicateRequestError, match="'one'"):
                client.generate(PROMPT, greedy(1), request_id="one")
            # The refused request has not disturbed the live one.
            assert first_tokens(stream)

    def test_id_can_be_used_again_after_the_end(self, client: Client) -> None:
        for _ in range(3):
            output = client.generate(PROMPT, greedy(2), request_id="again")
            assert output.request_id == "again"

    def test_id_can_be_used_again_after_a_cancellation(self, client: Client) -> None:
        with client.stream(PROMPT, ENDLESS, request_id="cancelled") as stream:
            first_tokens(stream)
        wait_until_idle(client, PROMPT_LIMIT_S)
        assert client.generate(PROMPT, greedy(2), request_id="cancelled").token_ids
