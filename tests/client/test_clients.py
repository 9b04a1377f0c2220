"""Both clients against a scripted server."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from google.rpc import code_pb2, error_details_pb2

from nanovllm import AsyncClient, Chat, Client, SamplingParams
from nanovllm.errors import (
    DeadlineExceededError,
    DuplicateRequestError,
    FieldViolation,
    InvalidRequestError,
    NanovllmError,
    OverloadedError,
    RequestCancelledError,
    RequestTooLargeError,
    ServerError,
    UnavailableError,
)
from nanovllm.outputs import FinishReason, TokenLogprobs, Usage
from nanovllm.server_info import Health
from tests.client.fake_server import error_status, overloaded

LIMIT_S = 10.0


async def _asynchronously(address: str, method: str, *args: Any, **options: Any) -> Any:
    async with AsyncClient(address) as client:
        if method == "stream":
            return [delta async for delta in client.stream(*args, **options)]
        return await getattr(client, method)(*args, **options)


def _synchronously(address: str, method: str, *args: Any, **options: Any) -> Any:
    with Client(address) as client:
        result = getattr(client, method)(*args, **options)
        return list(result) if method == "stream" else result


@pytest.fixture(params=["sync", "asyncio"])
def call(request, server) -> Callable[..., Any]:
    """Calls one method of either client."""

    def run(method: str, *args: Any, **options: Any) -> Any:
        if request.param == "sync":
            return _synchronously(server.address, method, *args, **options)
        return asyncio.run(_asynchronously(server.address, method, *args, **options))

    return run


class TestGenerate:
    def test_deltas_fold_into_one_output(self, call):
        output = call("generate", "a b c", request_id="mine")
        assert output.request_id == "mine"
        assert output.text == "abc"
        assert output.token_ids == [0, 1, 2]
        assert output.finish_reason is FinishReason.STOP
        assert output.finish_reason == "stop"
        assert (output.num_prompt_tokens, output.num_cached_tokens) == (3, 1)
        assert output.prompt_token_ids is None
        assert output.completions[0].stop_reason == 2
        assert output.completions[0].logprobs is None

    def test_interleaved_completions_are_kept_apart(self, call):
        output = call("generate", "a b", SamplingParams(n=3))
        assert [c.text for c in output.outputs] == ["ab", "a1b1", "a2b2"]
        assert [c.index for c in output.completions] == [0, 1, 2]
        assert output.num_generated_tokens == 6

    def test_log_probabilities_come_with_every_token(self, call):
        (completion,) = call("generate", "a b", SamplingParams(logprobs=2)).completions
        assert completion.logprobs == [TokenLogprobs(-0.5, (7, 8), (-0.5, -1.0))] * 2

    def test_prompt_token_ids_are_sent_and_returned(self, call, server):
        output = call("generate", [5, 6])
        assert list(server.service.requests[-1].token_ids.ids) == [5, 6]
        assert output.prompt_token_ids == [5, 6]

    def test_chat_messages_are_sent_with_template_options(self, call, server):
        message = {"role": "user", "content": "hi"}
        call("generate", Chat([message], False, {"enable_thinking": False}))
        chat = server.service.requests[-1].chat
        assert (chat.messages[0].role, chat.messages[0].content) == ("user", "hi")
        assert chat.add_generation_prompt is False
        assert chat.template_kwargs_json == '{"enable_thinking": false}'
        assert call("generate", [message]).text == "hi"

    def test_options_reach_the_server(self, call, server):
        call("generate", "a", priority=3, cache_salt="tenant")
        request = server.service.requests[-1]
        assert (request.priority, request.cache_salt) == (3, "tenant")
        assert len(request.request_id) == 32

    def test_stream_ending_early_is_a_server_error(self, call, server):
        server.service.cut_short = True
        with pytest.raises(ServerError, match="ended before completion 0"):
            call("generate", "a")

    @pytest.mark.parametrize("prompt", [None, b"x", 3, ["a"], [1, "a"], {"text": "a"}])
    def test_prompt_of_unknown_kind_is_refused(self, call, prompt, server):
        with pytest.raises(TypeError, match="prompt"):
            call("generate", prompt)
        assert not server.service.requests

    def test_message_with_unknown_keys_is_refused(self, call):
        with pytest.raises(TypeError, match='"role" and "content"'):
            call("generate", [{"role": "user", "content": "x", "name": "y"}])


class TestStream:
    def test_deltas_arrive_as_they_are_made(self, server):
        server.service.go_on.clear()
        with Client(server.address) as client, client.stream("a b", request_id="r") as stream:
            first = next(stream)
            assert (first.text, first.token_ids, first.finish_reason) == ("a", (0,), None)
            server.service.go_on.set()
            rest = list(stream)
        assert [delta.text for delta in rest] == ["b", ""]
        assert rest[-1].usage == Usage(2, 2, 1)
        assert stream.request_id == "r"

    def test_breaking_out_of_the_loop_cancels_the_request(self, server):
        server.service.go_on.clear()
        with Client(server.address) as client:
            for delta in client.stream("a b"):
                assert delta.text == "a"
                break
            assert server.service.cancelled.wait(LIMIT_S)

    def test_breaking_out_of_the_asyncio_loop_cancels_the_request(self, server):
        server.service.go_on.clear()

        async def run() -> bool:
            async with AsyncClient(server.address) as client:
                async for delta in client.stream("a b"):
                    assert delta.text == "a"
                    break
                return await asyncio.to_thread(server.service.cancelled.wait, LIMIT_S)

        assert asyncio.run(run())

    @pytest.mark.parametrize("share_call", [False, True])
    @pytest.mark.parametrize("resume", [False, True])
    def test_reading_a_closed_asyncio_stream_says_that_it_was_cancelled(
        self, server, share_call, resume
    ):
        server.service.go_on.clear()

        async def run() -> None:
            async with AsyncClient(server.address, share_call=share_call, resume=resume) as client:
                stream = client.stream("a b")
                assert (await anext(stream)).text == "a"
                stream.close()
                with pytest.raises(RequestCancelledError):
                    async for _ in stream:
                        pass

        asyncio.run(run())

    def test_cancelling_the_task_cancels_the_request(self, server):
        server.service.go_on.clear()

        async def run() -> bool:
            async with AsyncClient(server.address) as client:
                started = asyncio.Event()

                async def read() -> None:
                    async for _ in client.stream("a b"):
                        started.set()

                task = asyncio.create_task(read())
                await started.wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                return await asyncio.to_thread(server.service.cancelled.wait, LIMIT_S)

        assert asyncio.run(run())

    def test_finished_stream_stays_finished(self, call):
        assert [delta.text for delta in call("stream", "a")] == ["a", ""]

    def test_reading_on_after_close_is_a_cancelled_request(self, server):
        server.service.go_on.clear()
        with Client(server.address) as client:
            stream = client.stream("a b")
            next(stream)
            stream.close()
            with pytest.raises(RequestCancelledError):
                next(stream)


class TestErrors:
    def test_bad_request_names_its_fields(self, call, server):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field="sampling_params.top_p", description="must be in (0, 1]"
        )
        server.service.errors.append(
            error_status(
                code_pb2.INVALID_ARGUMENT,
                "sampling_params.top_p must be in (0, 1], got 2",
                error_details_pb2.BadRequest(field_violations=[violation]),
            )
        )
        with pytest.raises(InvalidRequestError, match=r"top_p .* got 2") as caught:
            call("generate", "a")
        assert caught.value.fields == ("sampling_params.top_p",)
        assert caught.value.violations == (
            FieldViolation("sampling_params.top_p", "must be in (0, 1]"),
        )
        assert isinstance(caught.value, ValueError)

    def test_full_queue_says_when_to_retry(self, call, server):
        server.service.errors.append(overloaded(1.25))
        with pytest.raises(OverloadedError, match="queue is full") as caught:
            call("generate", "a")
        assert caught.value.retry_after_s == 1.25

    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            (code_pb2.RESOURCE_EXHAUSTED, RequestTooLargeError),
            (code_pb2.ALREADY_EXISTS, DuplicateRequestError),
            (code_pb2.CANCELLED, RequestCancelledError),
            (code_pb2.INTERNAL, ServerError),
            (code_pb2.UNIMPLEMENTED, ServerError),
            (code_pb2.UNAVAILABLE, UnavailableError),
            (code_pb2.INVALID_ARGUMENT, InvalidRequestError),
        ],
    )
    def test_each_code_has_its_error(self, call, server, code, expected):
        server.service.errors.append(error_status(code, "because of this"))
        with pytest.raises(NanovllmError, match="because of this") as caught:
            call("generate", "a")
        assert type(caught.value) is expected

    def test_deadline_of_the_call_is_an_error_of_its_own(self, call, server):
        server.service.go_on.clear()
        with pytest.raises(DeadlineExceededError) as caught:
            call("generate", "a b", timeout_s=0.2)
        assert isinstance(caught.value, TimeoutError)

    def test_deadline_of_the_client_holds_when_the_call_has_none(self, server):
        server.service.go_on.clear()
        with (
            Client(server.address, timeout_s=0.2) as client,
            pytest.raises(DeadlineExceededError),
        ):
            client.generate("a b")

    def test_unreachable_server_is_named(self, call, server):
        server.stop()
        with pytest.raises(UnavailableError, match=f"{server.address} is unavailable"):
            call("model_info")

    @pytest.mark.parametrize(
        "address", ["", "localhost", "http://localhost:80", "unix:", ":80", "host:http"]
    )
    def test_address_that_is_none_is_refused(self, address):
        with pytest.raises(ValueError, match="HOST:PORT"):
            Client(address)


class TestOtherCalls:
    def test_tokenize_and_detokenize(self, call):
        assert call("tokenize", "hi") == [104, 105]
        assert call("tokenize", [{"role": "user", "content": "hi"}]) == [104, 105]
        assert call("detokenize", [104, 105]) == "hi"

    def test_tokenizing_token_ids_is_refused(self, call):
        with pytest.raises(TypeError, match="token ids already"):
            call("tokenize", [1, 2])

    def test_abort_says_whether_the_request_lived(self, call):
        assert call("abort", "live") is True
        assert call("abort", "gone") is False

    def test_model_info_carries_default_sampling_params(self, call):
        info = call("model_info")
        assert (info.model_name, info.vocab_size, info.eos_token_ids) == ("fake", 256, (2,))
        assert info.default_sampling_params == SamplingParams(temperature=0.5, top_k=20)

    def test_server_status_carries_the_executor(self, call):
        status = call("server_status")
        assert (status.num_running, status.num_waiting, status.kv_block_size) == (1, 2, 16)
        assert status.executor_connected
        assert status.executor.epoch == 2**63

    def test_health_follows_the_server(self, call, server):
        assert call("health") is Health.SERVING
        server.health.enter_graceful_shutdown()
        assert call("health") is Health.NOT_SERVING
