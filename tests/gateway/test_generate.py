"""Generate and Abort of vLLM's service: what smg relies on, and what it is told instead."""

import asyncio

import grpc
import pytest
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from nanovllm.v1 import inference_pb2
from scheduler_service.admission import AdmissionLimits
from tests.gateway.conftest import Serve
from tests.gateway.serving import PROMPT, Gateway, request
from tests.scheduler.simulated_executor import expected_output
from tests.scheduler_service.engine_harness import NO_LIMITS
from tests.scheduler_service.serving import failure, read_all, until

OUTPUT = expected_output(PROMPT, len(PROMPT) + 9, ())


def test_a_stream_has_delta_chunks_and_one_complete(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        *chunks, last = await read_all(gateway.stub.Generate(request(stream=True)))
        assert len(chunks) > 1
        assert [token for r in chunks for token in r.chunk.token_ids] == OUTPUT
        counts = [r.chunk.completion_tokens for r in chunks]
        assert counts == sorted(set(counts))
        assert counts[-1] == 9
        assert {r.chunk.prompt_tokens for r in chunks} == {4}
        assert last.complete.finish_reason == "length"
        assert (last.complete.prompt_tokens, last.complete.completion_tokens) == (4, 9)
        assert not last.complete.output_ids

    serve(scenario)


def test_a_whole_answer_comes_in_one_message_per_index_at_the_end(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        responses = await read_all(gateway.stub.Generate(request(n=3)))
        assert sorted(r.complete.index for r in responses) == [0, 1, 2]
        assert all(list(r.complete.output_ids) == OUTPUT for r in responses)

    serve(scenario)


def test_completions_that_end_apart_are_sent_together(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        # One slot is left, so that one completion begins when the other has ended.
        others = [
            asyncio.create_task(read_all(gateway.stub.Generate(request(max_tokens=120))))
            for _ in range(7)
        ]
        await until(lambda: gateway.harness.pool.load.num_running == 7)
        call = gateway.stub.Generate(request(n=6))
        await call.initial_metadata()
        labels = {"model_name": "tiny", "finished_reason": "length"}
        registry = gateway.harness.metrics.registry
        num_ended = registry.get_sample_value("nanovllm_requests_total", labels)
        assert num_ended is not None
        assert num_ended >= 6
        assert len(await read_all(call)) == 6
        await asyncio.gather(*others)

    serve(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_stand_beside_their_tokens(serve: Serve, stream: bool) -> None:
    async def scenario(gateway: Gateway) -> None:
        responses = await read_all(gateway.stub.Generate(request(stream=stream, logprobs=2)))
        parts = [
            r.chunk.output_logprobs if r.HasField("chunk") else r.complete.output_logprobs
            for r in responses
        ]
        assert [token for part in parts for token in part.token_ids] == OUTPUT
        assert sum(len(part.token_logprobs) for part in parts) == 9
        tops = [top for part in parts for top in part.top_logprobs]
        assert [len(top.values) for top in tops] == [len(top.token_ids) for top in tops] == [2] * 9

    serve(scenario)


def test_headers_come_with_the_first_token_and_no_earlier(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        call = gateway.stub.Generate(request(stream=True))
        headers = asyncio.create_task(call.initial_metadata())
        await until(lambda: gateway.harness.pool.load.num_waiting == 1)
        await asyncio.sleep(0.05)
        assert not headers.done()
        gateway.harness.connect()
        await headers
        await read_all(call)

    serve(scenario, connect=False)


@pytest.mark.parametrize("kind", ["string", "token", "eos"])
def test_what_stopped_a_completion_is_told_unless_it_is_the_end_of_sequence(
    serve: Serve, kind: str
) -> None:
    async def scenario(gateway: Gateway) -> None:
        text = gateway.service.encoder._tokenizer.decode(OUTPUT[2:4])
        params = {
            "string": {"stop": [text]},
            "token": {"stop_token_ids": [OUTPUT[3]]},
            "eos": {"ignore_eos": False, "max_tokens": 9},
        }[kind]
        (response,) = await read_all(gateway.stub.Generate(request(**params)))
        complete = response.complete
        if kind == "eos":
            assert complete.finish_reason == "length"
            assert complete.WhichOneof("matched_stop") is None
            return
        assert complete.finish_reason == "stop"
        if kind == "string":
            assert complete.matched_stop_str == text
            assert list(complete.output_ids) == OUTPUT[: len(complete.output_ids)]
            assert len(complete.output_ids) < 9
        else:
            assert complete.matched_token_id == OUTPUT[3]

    serve(scenario)


@pytest.mark.parametrize(
    ("max_tokens", "num_tokens"), [(0, 1), (2**32 - 1, 128 - len(PROMPT)), (1000, 124)]
)
def test_a_limit_of_nothing_or_beyond_the_context_is_clamped(
    serve: Serve, max_tokens: int, num_tokens: int
) -> None:
    async def scenario(gateway: Gateway) -> None:
        (response,) = await read_all(gateway.stub.Generate(request(max_tokens=max_tokens)))
        assert len(response.complete.output_ids) == num_tokens
        assert response.complete.finish_reason == "length"

    serve(scenario)


def test_text_is_tokenized_here(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        message = request()
        message.text = "ab"
        (response,) = await read_all(gateway.stub.Generate(message))
        assert response.complete.prompt_tokens == 2

    serve(scenario)


UNSUPPORTED = {
    "sampling_params.json_schema": {"json_schema": "{}"},
    "sampling_params.json_object": {"json_object": True},
    "sampling_params.choice": {"choice": pb.ChoiceConstraint(choices=["a"])},
    "sampling_params.prompt_logprobs": {"prompt_logprobs": 0},
    "sampling_params.truncate_prompt_tokens": {"truncate_prompt_tokens": -1},
    "sampling_params.grammar_from_first_token": {"grammar_from_first_token": True},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_sampling_field_that_is_not_supported_is_refused_by_name(
    serve: Serve, field: str
) -> None:
    async def scenario(gateway: Gateway) -> None:
        error = await failure(gateway.stub.Generate(request(**UNSUPPORTED[field])))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == f"{field}: is not supported by this server"
        labels = {"model_name": "tiny", "reason": "invalid_field"}
        registry = gateway.harness.metrics.registry
        assert registry.get_sample_value("nanovllm_admission_rejections_total", labels) == 1

    serve(scenario)


@pytest.mark.parametrize(
    "field", ["mm_inputs", "media_refs", "kv_transfer_params_json", "data_parallel_rank"]
)
def test_a_field_beside_the_sampling_is_refused_by_name_too(serve: Serve, field: str) -> None:
    async def scenario(gateway: Gateway) -> None:
        message = request()
        if field == "kv_transfer_params_json":
            message.kv_transfer_params_json = "{}"
        elif field == "data_parallel_rank":
            message.data_parallel_rank = 0
        else:
            getattr(message, field).SetInParent()
        error = await failure(gateway.stub.Generate(message))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith(f"{field}: ")

    serve(scenario)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"temperature": -1.0}, "sampling_params.temperature"),
        ({"logprobs": -1}, "sampling_params.logprobs"),
        ({"n": 100}, "sampling_params.n"),
        ({"min_tokens": 10}, "sampling_params.min_tokens"),
        ({"top_k": 2**32 - 1}, "sampling_params.top_k"),
        ({"stop_token_ids": [2**32 - 1]}, "sampling_params.stop_token_ids"),
    ],
)
def test_values_are_held_to_the_same_rules_as_in_our_own_api(
    serve: Serve, params: dict[str, object], field: str
) -> None:
    async def scenario(gateway: Gateway) -> None:
        error = await failure(gateway.stub.Generate(request(**params)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith(f"{field}: ")

    serve(scenario)


@pytest.mark.parametrize("token_ids", [[], [320], [2**32 - 1], [1] * 256])
def test_a_bad_prompt_is_told_by_their_name_of_it(serve: Serve, token_ids: list[int]) -> None:
    async def scenario(gateway: Gateway) -> None:
        message = request()
        message.tokenized.input_ids[:] = token_ids
        error = await failure(gateway.stub.Generate(message))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (error.details() or "").startswith("tokenized.input_ids: ")

    serve(scenario)


def test_unset_sampling_fields_come_from_the_model(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        message = request(stream=True)
        message.sampling_params.CopyFrom(pb.SamplingParams(max_tokens=100, ignore_eos=True))
        call = gateway.stub.Generate(message)
        await until(lambda: bool(gateway.harness.engine.live_requests()))
        (completion,) = gateway.harness.engine.live_requests()[0].completions
        sampling = completion.seq.sampling
        assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (
            1.0,
            1.0,
            1.0,
        )
        await read_all(call)

    serve(scenario)


def test_what_a_retry_may_help_is_told_so(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        error = await failure(gateway.stub.Generate(request(n=5)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    serve(scenario, max_queued_requests=4)


def test_what_no_retry_can_help_is_a_failed_precondition(serve: Serve) -> None:
    limits = AdmissionLimits(
        max_queued_requests=0,
        max_queued_tokens=NO_LIMITS.max_queued_tokens,
        max_queue_wait_s=0,
        max_requests_per_client=0,
        max_response_bytes=100,
    )

    async def scenario(gateway: Gateway) -> None:
        error = await failure(gateway.stub.Generate(request(logprobs=1)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION

    serve(scenario, admission=limits)


@pytest.mark.parametrize("stream", [False, True])
def test_abort_ends_a_request_with_its_finish_reason(serve: Serve, stream: bool) -> None:
    async def scenario(gateway: Gateway) -> None:
        message = request(stream=stream, request_id="mine", max_tokens=100)
        call = asyncio.create_task(read_all(gateway.stub.Generate(message)))
        await until(lambda: bool(gateway.harness.engine.live_requests()))
        await gateway.stub.Abort(pb.AbortRequest(request_ids=["nobody's", "mine"]))
        assert (await call)[-1].complete.finish_reason == "abort"
        assert not gateway.harness.engine.live_requests()

    serve(scenario, connect=False)


def test_a_cancelled_call_ends_its_request(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        call = gateway.stub.Generate(request(stream=True, max_tokens=100))
        await until(lambda: bool(gateway.harness.engine.live_requests()))
        call.cancel()
        await until(lambda: not gateway.harness.engine.live_requests())

    serve(scenario, connect=False)


def test_both_apis_give_the_same_tokens(serve: Serve) -> None:
    async def scenario(gateway: Gateway) -> None:
        (theirs,) = await read_all(gateway.stub.Generate(request()))
        ours = await read_all(
            gateway.service.stub.Generate(
                inference_pb2.GenerateRequest(
                    token_ids=inference_pb2.TokenIds(ids=PROMPT),
                    sampling_params=inference_pb2.SamplingParams(
                        temperature=0, max_tokens=9, ignore_eos=True
                    ),
                )
            )
        )
        assert list(theirs.complete.output_ids) == [t for r in ours for t in r.token_ids]

    serve(scenario)
