"""The public service behind a real gRPC server, with a simulated executor."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.text.tokenizer import Tokenizer
from scheduler_service.validation import RequestKey
from tests.scheduler.simulated_executor import expected_output
from tests.scheduler_service.engine_harness import CAPACITY, MODEL
from tests.scheduler_service.serving import (
    LIMIT_S,
    Service,
    detail,
    failure,
    read_all,
    retry_after_s,
    served,
    until,
)

PROMPT = [0, 1, 1, 2]


@pytest.fixture
def serve(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., None]:
    """Runs a scenario against the service; the executor iterates by itself meanwhile."""

    def run(scenario: Callable[[Service], Awaitable[None]], **options) -> None:
        async def main() -> None:
            address = f"unix:{tmp_path}/scheduler.sock"
            async with served(tokenizer, address, **options) as service:
                await scenario(service)

        asyncio.run(main())

    return run


def request(**fields) -> pb.GenerateRequest:
    params = fields.pop("params", {})
    fields.setdefault("token_ids", pb.TokenIds(ids=PROMPT))
    return pb.GenerateRequest(
        sampling_params=pb.SamplingParams(**({"ignore_eos": True, "max_tokens": 9} | params)),
        **fields,
    )


def test_deltas_become_responses_and_only_the_last_has_usage(serve, tokenizer):
    async def scenario(service: Service) -> None:
        responses = await read_all(service.stub.Generate(request(request_id="mine")))
        output = expected_output(PROMPT, len(PROMPT) + 9, ())
        assert [token for r in responses for token in r.token_ids] == output
        assert "".join(r.text for r in responses) == tokenizer.decode(output)
        assert {r.request_id for r in responses} == {"mine"}
        *first, last = responses
        assert all(r.finish_reason == pb.FINISH_REASON_UNSPECIFIED for r in first)
        assert not any(r.HasField("usage") or r.HasField("stop_reason") for r in first)
        assert last.finish_reason == pb.FINISH_REASON_LENGTH
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 9)
        assert not last.HasField("stop_reason")

    serve(scenario)


@pytest.mark.parametrize("kind", ["stop_string", "token_id"])
def test_the_match_is_told_as_string_or_token(serve, tokenizer, kind: str):
    async def scenario(service: Service) -> None:
        output = expected_output(PROMPT, len(PROMPT) + 9, ())
        stop = tokenizer.decode(output[2:4])
        params = {"stop": [stop]} if kind == "stop_string" else {"stop_token_ids": [output[3]]}
        last = (await read_all(service.stub.Generate(request(params=params))))[-1]
        assert last.finish_reason == pb.FINISH_REASON_STOP
        assert getattr(last.stop_reason, kind) == (stop if kind == "stop_string" else output[3])

    serve(scenario)


def test_a_wrong_field_is_invalid_argument_and_counted(serve):
    async def scenario(service: Service) -> None:
        error = await failure(service.stub.Generate(request(params={"temperature": -1})))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        bad_request = detail(error, error_details_pb2.BadRequest)
        assert bad_request is not None
        (violation,) = bad_request.field_violations
        assert violation.field == "sampling_params.temperature"
        rejections = service.harness.metrics.registry.get_sample_value(
            "nanovllm_admission_rejections_total",
            {"model_name": "tiny", "reason": "invalid_field"},
        )
        assert rejections == 1

    serve(scenario)


def test_a_full_queue_says_when_to_come_back(serve):
    async def scenario(service: Service) -> None:
        waiting = service.stub.Generate(request())
        await until(lambda: service.harness.pool.load.num_waiting == 1)
        error = await failure(service.stub.Generate(request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (retry_after_s(error) or 0) >= 1
        waiting.cancel()

    serve(scenario, connect=False, max_queued_requests=1)


def test_a_live_request_id_is_refused_and_abort_ends_its_owner(serve):
    async def scenario(service: Service) -> None:
        first = service.stub.Generate(request(request_id="mine", params={"n": 2}))
        await until(lambda: service.harness.pool.load.num_waiting == 2)
        error = await failure(service.stub.Generate(request(request_id="mine")))
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        answer = await service.stub.Abort(pb.AbortRequest(request_id="mine"))
        assert answer.aborted
        responses = await read_all(first)
        assert [r.finish_reason for r in responses] == [pb.FINISH_REASON_ABORT] * 2
        assert sorted(r.index for r in responses) == [0, 1]
        again = await service.stub.Abort(pb.AbortRequest(request_id="mine"))
        assert not again.aborted
        assert (await failure(service.stub.Abort(pb.AbortRequest()))).code() is (
            grpc.StatusCode.INVALID_ARGUMENT
        )

    serve(scenario, connect=False)


def test_id_and_queue_place_are_taken_while_the_prompt_is_tokenized(serve, slow_tokenizer):
    async def scenario(service: Service) -> None:
        first = service.stub.Generate(request(text="abc", token_ids=None, request_id="mine"))
        await until(lambda: RequestKey("mine") in service.harness.engine._reservations)
        same_id = await failure(service.stub.Generate(request(request_id="mine")))
        assert same_id.code() is grpc.StatusCode.ALREADY_EXISTS
        no_place = await failure(service.stub.Generate(request()))
        assert no_place.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        slow_tokenizer.set()
        assert (await read_all(first))[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert len(await read_all(service.stub.Generate(request(request_id="mine"))))

    serve(scenario, max_queued_requests=1)


def test_abort_ends_a_request_whose_prompt_is_being_tokenized(serve, slow_tokenizer):
    async def scenario(service: Service) -> None:
        call = service.stub.Generate(
            request(text="abc", token_ids=None, request_id="mine", params={"n": 2})
        )
        await until(lambda: RequestKey("mine") in service.harness.engine._reservations)
        assert (await service.stub.Abort(pb.AbortRequest(request_id="mine"))).aborted
        responses = await read_all(call)
        assert [r.finish_reason for r in responses] == [pb.FINISH_REASON_ABORT] * 2
        assert sorted(r.index for r in responses) == [0, 1]
        assert not any(r.token_ids or r.text for r in responses)
        assert not (await service.stub.Abort(pb.AbortRequest(request_id="mine"))).aborted

    serve(scenario)


def test_a_call_cancelled_while_its_prompt_is_tokenized_leaves_nothing(serve, slow_tokenizer):
    async def scenario(service: Service) -> None:
        call = service.stub.Generate(request(text="abc", token_ids=None, request_id="mine"))
        await until(lambda: RequestKey("mine") in service.harness.engine._reservations)
        call.cancel()
        await asyncio.wait_for(service.harness.engine.wait_until_idle(), LIMIT_S)
        assert service.harness.engine._reservations == {}

    serve(scenario)


def test_detokenize_takes_four_lengths_of_the_model_and_no_more(serve):
    async def scenario(service: Service) -> None:
        most = [0] * (4 * CAPACITY.max_model_len)
        answer = await service.stub.Detokenize(pb.DetokenizeRequest(token_ids=most))
        assert answer.text
        error = await failure(service.stub.Detokenize(pb.DetokenizeRequest(token_ids=[*most, 0])))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == "token_ids: at most 512 ids, got 513"

    serve(scenario)


def test_tokenize_names_the_limit_that_it_applies(serve):
    async def scenario(service: Service) -> None:
        error = await failure(service.stub.Tokenize(pb.TokenizeRequest(text="a" * 513)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "takes at most 512" in error.details()
        assert "output" not in error.details()

    serve(scenario)


def test_a_cancelled_call_and_a_passed_deadline_leave_nothing(serve):
    async def scenario(service: Service) -> None:
        cancelled = service.stub.Generate(request())
        late = service.stub.Generate(request(), timeout=0.1)
        await until(lambda: service.harness.pool.load.num_waiting == 2)
        cancelled.cancel()
        assert (await failure(late)).code() is grpc.StatusCode.DEADLINE_EXCEEDED

    serve(scenario, connect=False)


def test_text_and_ids_are_translated_both_ways(serve, tokenizer):
    async def scenario(service: Service) -> None:
        answer = await service.stub.Tokenize(pb.TokenizeRequest(text="h\u00e9<|im_end|>"))
        assert list(answer.token_ids) == tokenizer.encode("h\u00e9<|im_end|>")
        assert answer.max_model_len == CAPACITY.max_model_len
        back = await service.stub.Detokenize(pb.DetokenizeRequest(token_ids=answer.token_ids))
        assert back.text == "h\u00e9"
        whole = await service.stub.Detokenize(
            pb.DetokenizeRequest(token_ids=answer.token_ids, skip_special_tokens=False)
        )
        assert whole.text == "h\u00e9<|im_end|>"
        empty = await service.stub.Tokenize(pb.TokenizeRequest(text=""))
        assert list(empty.token_ids) == []
        message = pb.ChatMessage(role="user", content="Hi")
        chat = await service.stub.Tokenize(
            pb.TokenizeRequest(chat=pb.ChatMessages(messages=[message]))
        )
        assert tokenizer.decode(list(chat.token_ids)).endswith("assistant\n")
        for bad in (
            service.stub.Tokenize(pb.TokenizeRequest()),
            service.stub.Detokenize(pb.DetokenizeRequest(token_ids=[320])),
        ):
            assert (await failure(bad)).code() is grpc.StatusCode.INVALID_ARGUMENT

    serve(scenario)


def test_the_model_is_described_with_the_length_that_holds_now(serve):
    async def scenario(service: Service) -> None:
        info = await service.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert (info.model_name, info.architecture) == (MODEL.name, MODEL.architecture)
        assert (info.vocab_size, list(info.eos_token_ids)) == (320, [258])
        assert info.max_model_len == CAPACITY.max_model_len
        assert info.has_chat_template
        assert info.default_sampling_params.temperature == 1
        service.harness.lose_executor()
        info = await service.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert info.max_model_len == MODEL.max_model_len

    serve(scenario)


def test_the_status_shows_load_and_executor(serve):
    async def scenario(service: Service) -> None:
        status = await service.stub.GetServerStatus(pb.GetServerStatusRequest())
        assert status.executor_state == pb.EXECUTOR_STATE_DISCONNECTED
        assert not status.HasField("executor")
        assert status.num_kv_blocks == 0
        waiting = service.stub.Generate(request(params={"n": 3}))
        await until(lambda: service.harness.pool.load.num_waiting == 3)
        status = await service.stub.GetServerStatus(pb.GetServerStatusRequest())
        assert (status.num_waiting, status.num_running) == (3, 0)
        waiting.cancel()
        await until(lambda: service.harness.pool.load.num_waiting == 0)
        service.harness.connect(replace(CAPACITY, executor_epoch=2**63))
        status = await service.stub.GetServerStatus(pb.GetServerStatusRequest())
        assert status.executor_state == pb.EXECUTOR_STATE_CONNECTED
        assert (status.num_kv_blocks, status.kv_block_size) == (64, 4)
        assert status.num_free_kv_blocks + status.num_cached_kv_blocks == 64
        assert (status.executor.epoch, status.executor.address) == (2**63, "unix:/executor")
        service.harness.join()
        status = await service.stub.GetServerStatus(pb.GetServerStatusRequest())
        assert [each.address for each in status.executors] == ["unix:/executor", "unix:/other"]
        assert status.executor == status.executors[0]
        assert (status.num_kv_blocks, status.num_free_kv_blocks) == (128, 128)
        assert status.uptime_s > 0

    serve(scenario, connect=False)
