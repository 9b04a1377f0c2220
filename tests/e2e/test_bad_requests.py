"""Every bad input is refused with the documented code and the field's name, and nothing breaks."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from nanovllm import Client, LocalServices
from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.support import MAX_MODEL_LEN, VOCAB_SIZE, CallError, greedy

NAN, INF = float("nan"), float("inf")
ChangeRequest = Callable[[pb.GenerateRequest], object]


@pytest.fixture(scope="module")
def stub(services: LocalServices) -> Iterator[pb_grpc.InferenceServiceStub]:
    options = [("grpc.max_send_message_length", 32 * 1024 * 1024)]
    with grpc.insecure_channel(services.address, options) as channel:
        yield pb_grpc.InferenceServiceStub(channel)


def refusal(stub: pb_grpc.InferenceServiceStub, request: pb.GenerateRequest) -> CallError:
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request, timeout=30.0))
    return CallError.of(caught.value)


def good_request() -> pb.GenerateRequest:
    return pb.GenerateRequest(
        text="abc", sampling_params=pb.SamplingParams(max_tokens=2, temperature=0.0)
    )


def expect_service(client: Client) -> None:
    assert len(client.generate("abc", greedy(2)).token_ids) == 2


BAD_NUMBERS: dict[str, list[float]] = {
    "temperature": [-0.1, 100.5, NAN, INF, -INF],
    "top_p": [0.0, -0.1, 1.5, NAN, INF],
    "min_p": [-0.1, 1.5, NAN, INF],
    "presence_penalty": [-2.1, 2.1, NAN, INF, -INF],
    "frequency_penalty": [-2.1, 2.1, NAN, INF, -INF],
    "repetition_penalty": [0.0, -1.0, 10.5, NAN, INF],
    "top_k": [-2, -(2**31)],
    "n": [0, -1, 65, 10**9],
    "max_tokens": [0, -1, -(2**31)],
    "min_tokens": [-1, 3, MAX_MODEL_LEN + 1],
    "logprobs": [-1, 21],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD_NUMBERS.items() for value in values]
)
def test_number_out_of_range_is_refused_by_name(
    stub: pb_grpc.InferenceServiceStub, client: Client, name: str, value: float
) -> None:
    request = good_request()
    setattr(request.sampling_params, name, value)
    error = refusal(stub, request)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.bad_fields == (f"sampling_params.{name}",)
    assert error.message.startswith(f"sampling_params.{name}: must be in ")
    expect_service(client)


def params(**fields: Any) -> ChangeRequest:
    def change(request: pb.GenerateRequest) -> None:
        request.sampling_params.MergeFrom(pb.SamplingParams(**fields))

    return change


def token_ids(*ids: int) -> ChangeRequest:
    return lambda request: request.token_ids.CopyFrom(pb.TokenIds(ids=ids))


def chat(*messages: tuple[str, str], **fields: Any) -> ChangeRequest:
    turns = [pb.ChatMessage(role=role, content=content) for role, content in messages]
    return lambda request: request.chat.CopyFrom(pb.ChatMessages(messages=turns, **fields))


def template_kwargs(text: str) -> ChangeRequest:
    return chat(("user", "hi"), template_kwargs_json=text)


def field(name: str, value: Any) -> ChangeRequest:
    return lambda request: setattr(request, name, value)


TEMPLATE_KWARGS = "chat.template_kwargs_json"
LOGIT_BIAS = "sampling_params.logit_bias"
BAD_FIELDS: dict[str, tuple[ChangeRequest, str]] = {
    "no-prompt": (lambda request: request.ClearField("text"), "prompt"),
    "empty-text": (field("text", ""), "text"),
    "empty-token-ids": (token_ids(), "token_ids"),
    "empty-chat": (chat(), "chat.messages"),
    "token-id-negative": (token_ids(1, -1), "token_ids.ids"),
    "token-id-at-vocabulary-size": (token_ids(VOCAB_SIZE), "token_ids.ids"),
    "token-id-huge": (token_ids(2**31 - 1), "token_ids.ids"),
    "token-ids-too-long": (token_ids(*([1] * MAX_MODEL_LEN)), "token_ids"),
    "text-too-long": (field("text", "a" * MAX_MODEL_LEN), "text"),
    "chat-too-long": (chat(("user", "a" * MAX_MODEL_LEN)), "chat"),
    "chat-without-a-role": (chat(("user", "a"), ("", "b")), "chat.messages[1].role"),
    "chat-of-too-many-messages": (chat(*[("user", "")] * 5000), "chat.messages"),
    "template-kwargs-no-json": (template_kwargs("{"), TEMPLATE_KWARGS),
    "template-kwargs-no-object": (template_kwargs("[1]"), TEMPLATE_KWARGS),
    "template-kwargs-reserved": (template_kwargs('{"tokenize": true}'), TEMPLATE_KWARGS),
    "template-kwargs-deep": (template_kwargs("[" * 100_000), TEMPLATE_KWARGS),
    "template-kwargs-too-deep-to-render": (
        template_kwargs('{"note": ' + "[" * 900 + "]" * 900 + "}"),
        TEMPLATE_KWARGS,
    ),
    "template-kwargs-clash": (template_kwargs('{"messages": []}'), TEMPLATE_KWARGS),
    "template-kwargs-of-wrong-type": (template_kwargs('{"tools": [1]}'), "chat"),
    "min-tokens-above-max-tokens": (params(min_tokens=3), "sampling_params.min_tokens"),
    "stop-strings-too-many": (params(stop=["x"] * 10_000), "sampling_params.stop"),
    "stop-string-empty": (params(stop=["a", ""]), "sampling_params.stop[1]"),
    "stop-string-too-long": (params(stop=["x" * 257]), "sampling_params.stop[0]"),
    "stop-string-without-text": (params(stop=["x"], detokenize=False), "sampling_params.stop"),
    "stop-token-negative": (params(stop_token_ids=[-1]), "sampling_params.stop_token_ids"),
    "stop-token-unknown": (params(stop_token_ids=[VOCAB_SIZE]), "sampling_params.stop_token_ids"),
    "stop-tokens-too-many": (params(stop_token_ids=range(65)), "sampling_params.stop_token_ids"),
    "bias-too-many": (params(logit_bias=dict.fromkeys(range(257), 1.0)), LOGIT_BIAS),
    "bias-of-unknown-token": (params(logit_bias={VOCAB_SIZE: 1.0}), LOGIT_BIAS),
    "bias-of-negative-token": (params(logit_bias={-1: 1.0}), LOGIT_BIAS),
    "bias-too-large": (params(logit_bias={7: 100.5}), f"{LOGIT_BIAS}[7]"),
    "bias-nan": (params(logit_bias={7: NAN}), f"{LOGIT_BIAS}[7]"),
    "priority-too-high": (field("priority", 1001), "priority"),
    "priority-too-low": (field("priority", -(2**31)), "priority"),
    "request-id-too-long": (field("request_id", "x" * 129), "request_id"),
    "cache-salt-too-long": (field("cache_salt", "é" * 129), "cache_salt"),
}


@pytest.mark.parametrize(("change", "bad_field"), BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_bad_field_is_refused_by_name(
    stub: pb_grpc.InferenceServiceStub, client: Client, change: ChangeRequest, bad_field: str
) -> None:
    request = good_request()
    change(request)
    error = refusal(stub, request)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.bad_fields == (bad_field,)
    assert error.message.startswith(bad_field)
    assert len(error.message) < 300
    expect_service(client)


def test_ten_megabytes_of_text_are_refused_at_once(
    stub: pb_grpc.InferenceServiceStub, client: Client
) -> None:
    request = good_request()
    request.text = "lorem ipsum " * 900_000
    start_s = time.monotonic()
    error = refusal(stub, request)
    assert time.monotonic() - start_s < 3.0
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.bad_fields == ("text",)
    expect_service(client)


def test_message_above_the_size_limit_is_refused(services: LocalServices, client: Client) -> None:
    with grpc.insecure_channel(services.address, [("grpc.max_send_message_length", -1)]) as channel:
        request = good_request()
        request.text = "x" * (33 * 1024 * 1024)
        error = refusal(pb_grpc.InferenceServiceStub(channel), request)
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    expect_service(client)


GOOD_EDGES: dict[str, ChangeRequest] = {
    "unknown-role": chat(("alien", "hi")),
    "empty-content": chat(("user", "")),
    "last-token-id": token_ids(VOCAB_SIZE - 1),
    "largest-numbers": params(
        temperature=100.0, top_p=1.0, min_p=1.0, top_k=2**31 - 1, n=64, logprobs=20
    ),
    "largest-penalties": params(
        presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=10.0
    ),
    "smallest-penalties": params(
        presence_penalty=-2.0, frequency_penalty=-2.0, repetition_penalty=1e-6
    ),
    "smallest-temperature": params(temperature=1e-38),
    "smallest-repetition-penalty": params(temperature=1.0, repetition_penalty=1e-38),
    "smallest-top-p": params(temperature=1.0, top_p=1e-38),
    "all-tokens": params(temperature=1.0, top_k=-1),
    "most-stops": params(stop=[f"{i:0256}" for i in range(32)], stop_token_ids=range(64)),
    "most-biases": params(logit_bias=dict.fromkeys(range(256), -100.0)),
    "every-token-forbidden-but-one": params(logit_bias={7: 100.0}, min_tokens=2),
    "unlimited-max-tokens": params(max_tokens=2**31 - 1, stop_token_ids=range(64, 128), n=1),
    "largest-min-tokens": lambda request: (
        token_ids(*([1] * (MAX_MODEL_LEN - 3)))(request),
        params(max_tokens=2**31 - 1, min_tokens=2**31 - 1)(request),
    ),
    "priorities": field("priority", 1000),
    "longest-id": field("request_id", "ü" * 128),
    "null-characters": field("text", "\0\0"),
}


@pytest.mark.parametrize("change", GOOD_EDGES.values(), ids=GOOD_EDGES.keys())
def test_value_at_the_edge_is_served(
    stub: pb_grpc.InferenceServiceStub, client: Client, change: ChangeRequest
) -> None:
    request = good_request()
    change(request)
    finished = [
        response.index
        for response in stub.Generate(request, timeout=60.0)
        if response.finish_reason != pb.FINISH_REASON_UNSPECIFIED
    ]
    assert sorted(finished) == list(range(max(1, request.sampling_params.n)))


class TestOtherCalls:
    @pytest.mark.parametrize("ids", [[-1], [VOCAB_SIZE]])
    def test_detokenize_refuses_unknown_ids(
        self, stub: pb_grpc.InferenceServiceStub, ids: list[int]
    ) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))
        error = CallError.of(caught.value)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.bad_fields == ("token_ids",)

    def test_detokenize_of_millions_of_ids_is_refused_at_once(
        self, stub: pb_grpc.InferenceServiceStub, client: Client
    ) -> None:
        request = pb.DetokenizeRequest(token_ids=[1] * 8_000_000)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Detokenize(request)
        assert CallError.of(caught.value).bad_fields == ("token_ids",)
        expect_service(client)

    def test_tokenize_refuses_a_request_without_a_prompt(
        self, stub: pb_grpc.InferenceServiceStub
    ) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Tokenize(pb.TokenizeRequest())
        assert CallError.of(caught.value).bad_fields == ("prompt",)

    def test_tokenize_of_nothing_is_nothing(self, client: Client) -> None:
        assert client.tokenize("") == []
        assert client.detokenize([]) == ""
