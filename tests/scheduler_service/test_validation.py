"""What a request may say; everything else is refused by the name of its field."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.v1 import inference_pb2 as pb
from scheduler_service.errors import InvalidFieldError
from scheduler_service.model_spec import DefaultSampling, ModelSpec
from scheduler_service.text.tokenizer import ChatTurn
from scheduler_service.validation import (
    ChatPrompt,
    GenerateSpec,
    TextPrompt,
    TokenPrompt,
    valid_detokenize_ids,
    validate_generate,
)

MODEL = ModelSpec(
    name="tiny",
    architecture="Qwen3ForCausalLM",
    vocab_size=320,
    max_model_len=128,
    eos_token_ids=(258, 257),
    defaults=DefaultSampling(
        temperature=0.6, top_p=0.95, top_k=20, min_p=0.0, repetition_penalty=1.1
    ),
    fingerprint="f" * 64,
)


def validate(prompt: pb.GenerateRequest | None = None, **params) -> GenerateSpec:
    request = prompt or pb.GenerateRequest(text="Hello")
    request.sampling_params.CopyFrom(pb.SamplingParams(**params))
    return validate_generate(request, MODEL)


def test_unset_fields_take_the_defaults_of_the_model():
    spec = validate()
    (sampling,) = spec.samplings
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.95, 20)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.0, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.0, 0.0)
    assert sampling.num_logprobs == -1
    assert (spec.n, spec.max_tokens, spec.min_tokens, spec.priority) == (1, None, 0, 0)
    assert spec.stop_token_ids == (258, 257)
    assert (spec.detokenize, spec.skip_special_tokens) == (True, True)
    assert spec.request_id


def test_a_zero_that_is_set_is_not_an_unset_field():
    spec = validate(temperature=0, min_p=0, logprobs=0, skip_special_tokens=False)
    assert spec.samplings[0].temperature == 0
    assert spec.samplings[0].num_logprobs == 0
    assert not spec.skip_special_tokens


@pytest.mark.parametrize("top_k", [0, -1, 320, 2**31 - 1])
def test_every_way_to_say_no_top_k_means_the_whole_vocabulary(top_k: int):
    assert validate(top_k=top_k).samplings[0].top_k == MODEL.vocab_size


def test_ignore_eos_leaves_only_the_stop_tokens_of_the_request():
    assert validate(ignore_eos=True).stop_token_ids == ()
    assert validate(ignore_eos=True, stop_token_ids=[5, 258]).stop_token_ids == (5, 258)
    assert validate(stop_token_ids=[5, 258, 5]).stop_token_ids == (258, 257, 5)


def test_completions_have_seeds_of_their_own_and_the_first_is_the_request_s():
    two, five = validate(seed=11, n=2), validate(seed=11, n=5)
    seeds = [sampling.seed for sampling in five.samplings]
    assert seeds[0] == 11
    assert len(set(seeds)) == 5
    assert [sampling.seed for sampling in two.samplings] == seeds[:2]
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert validate().samplings[0].seed != validate().samplings[0].seed


def test_logit_biases_are_kept_with_their_tokens():
    spec = validate(logit_bias={7: -100, 3: 2.5})
    assert spec.samplings[0].logit_bias == ((3, 2.5), (7, -100.0))


def test_each_kind_of_prompt_is_kept():
    assert validate().prompt == TextPrompt("Hello")
    tokens = validate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0, 319])))
    assert tokens.prompt == TokenPrompt([0, 319])
    message = pb.ChatMessage(role="user", content="Hi")
    chat = validate(pb.GenerateRequest(chat=pb.ChatMessages(messages=[message])))
    assert chat.prompt == ChatPrompt((ChatTurn("user", "Hi"),), True, "")


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"min_tokens": 129}, "min_tokens"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["ok", "x" * 257]}, "stop[1]"),
        ({"stop": [str(i) for i in range(33)]}, "stop"),
        ({"stop": ["x"], "detokenize": False}, "stop"),
        ({"stop_token_ids": [320]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 11}, "repetition_penalty"),
        ({"logit_bias": {320: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: 101.0}}, "logit_bias[1]"),
        ({"logit_bias": {1: math.nan}}, "logit_bias[1]"),
        ({"logit_bias": dict.fromkeys(range(257), 1.0)}, "logit_bias"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_a_sampling_parameter_out_of_range_is_refused_by_name(params: dict, field: str):
    with pytest.raises(InvalidFieldError) as caught:
        validate(**params)
    assert caught.value.field == f"sampling_params.{field}"
    assert caught.value.description


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 100, "top_p": 1, "top_k": -1, "min_p": 1, "n": 64, "logprobs": 20},
        {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 10},
        {"max_tokens": 2**31 - 1, "min_tokens": 2**31 - 1},
        {"min_tokens": 128},
        {"stop": ["x" * 256] + [str(i) for i in range(31)]},
        {"stop_token_ids": list(range(64))},
        {"logit_bias": dict.fromkeys(range(256), -100)},
    ],
)
def test_values_at_their_bounds_are_accepted(params: dict):
    validate(**params)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(text=""), "text"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1, 320])), "token_ids.ids"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1])), "token_ids.ids"),
        (pb.GenerateRequest(chat=pb.ChatMessages()), "chat.messages"),
        (
            pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(content="x")])),
            "chat.messages[0].role",
        ),
        (
            pb.GenerateRequest(chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user")] * 4097)),
            "chat.messages",
        ),
        (pb.GenerateRequest(text="x", request_id="r" * 129), "request_id"),
        (pb.GenerateRequest(text="x", cache_salt="\u00e9" * 129), "cache_salt"),
        (pb.GenerateRequest(text="x", priority=1001), "priority"),
        (pb.GenerateRequest(text="x", priority=-1001), "priority"),
    ],
)
def test_a_field_of_the_request_that_is_wrong_is_refused_by_name(request_, field: str):
    with pytest.raises(InvalidFieldError) as caught:
        validate_generate(request_, MODEL)
    assert caught.value.field == field


def test_the_first_token_outside_the_vocabulary_is_named():
    with pytest.raises(InvalidFieldError, match=r"id 400 at index 2 .*\[0, 320\)"):
        valid_detokenize_ids([1, 2, 400, -1], MODEL, max_ids=4)


@pytest.mark.parametrize(
    ("field", "check"),
    [
        (
            "token_ids",
            lambda ids: validate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))),
        ),
        ("sampling_params.stop_token_ids", lambda ids: validate(stop_token_ids=ids)),
        ("token_ids", lambda ids: valid_detokenize_ids(ids, MODEL, max_ids=127)),
    ],
)
def test_too_many_ids_are_refused_before_they_are_looked_at(field: str, check):
    unknown_ids = [400] * MODEL.max_model_len
    with pytest.raises(InvalidFieldError, match="at most") as caught:
        check(unknown_ids)
    assert caught.value.field == field


FLOATS = st.floats(width=32)
INTS = st.one_of(st.integers(-3, 330), st.integers(-(2**31), 2**31 - 1))
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": FLOATS,
        "top_p": FLOATS,
        "top_k": INTS,
        "min_p": FLOATS,
        "seed": st.integers(-(2**63), 2**63 - 1),
        "n": st.integers(-1, 66),
        "max_tokens": INTS,
        "min_tokens": INTS,
        "stop": st.lists(st.text(max_size=4), max_size=3),
        "stop_token_ids": st.lists(INTS, max_size=3),
        "ignore_eos": st.booleans(),
        "presence_penalty": FLOATS,
        "frequency_penalty": FLOATS,
        "repetition_penalty": FLOATS,
        "logit_bias": st.dictionaries(INTS, FLOATS, max_size=3),
        "logprobs": INTS,
        "detokenize": st.booleans(),
    },
)
PROMPTS = st.one_of(
    st.builds(dict, text=st.text(max_size=5)),
    st.builds(dict, token_ids=st.builds(pb.TokenIds, ids=st.lists(INTS, max_size=4))),
    st.builds(
        dict,
        chat=st.builds(
            pb.ChatMessages,
            messages=st.lists(
                st.builds(pb.ChatMessage, role=st.text(max_size=3), content=st.text(max_size=3)),
                max_size=2,
            ),
            template_kwargs_json=st.text(max_size=5),
        ),
    ),
    st.just({}),
)


@given(PROMPTS, PARAMS, INTS, st.text(max_size=140), st.text(max_size=5))
@settings(max_examples=200)
def test_any_request_is_valid_or_refused_with_the_field(prompt, params, priority, name, salt):
    request = pb.GenerateRequest(
        request_id=name,
        priority=priority,
        cache_salt=salt,
        sampling_params=pb.SamplingParams(**params),
        **prompt,
    )
    try:
        spec = validate_generate(request, MODEL)
    except InvalidFieldError as error:
        named, problem = error.field, error.description
        spec = None
    if spec is None:
        assert named
        assert problem
        return
    assert len(spec.samplings) == spec.n
    for sampling in spec.samplings:
        assert 0 <= sampling.temperature <= 100
        assert 0 < sampling.top_p <= 1
        assert 1 <= sampling.top_k <= MODEL.vocab_size
        assert -1 <= sampling.num_logprobs <= 20
