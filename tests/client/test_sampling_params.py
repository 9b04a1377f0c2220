import pytest

from nanovllm import SamplingParams
from nanovllm.v1 import inference_pb2 as pb


def test_unset_fields_stay_unset_on_the_wire():
    assert SamplingParams().to_proto() == pb.SamplingParams()


def test_zero_is_sent_where_zero_means_something():
    message = SamplingParams(temperature=0, max_tokens=0, logprobs=0, ignore_eos=False).to_proto()
    assert message.HasField("temperature")
    assert message.HasField("max_tokens")
    assert message.HasField("logprobs")
    assert message.HasField("ignore_eos")
    assert not message.HasField("top_p")


def test_every_field_of_the_message_can_be_set_and_comes_back():
    params = SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        seed=-(2**63),
        n=2,
        max_tokens=3,
        min_tokens=1,
        stop=("a", "b"),
        stop_token_ids=(7,),
        ignore_eos=True,
        include_stop_str_in_output=True,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.25,
        logit_bias={4: -100.0},
        logprobs=0,
        skip_special_tokens=False,
        detokenize=True,
    )
    message = params.to_proto()
    names = {descriptor.name for descriptor, _ in message.ListFields()}
    assert names == {descriptor.name for descriptor in pb.SamplingParams.DESCRIPTOR.fields}
    assert SamplingParams.from_proto(message) == params
    assert params.set_fields()["logprobs"] == 0


def test_single_stop_string_is_not_taken_apart():
    assert list(SamplingParams(stop="end").to_proto().stop) == ["end"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "0.5"),
        ("temperature", True),
        ("top_k", 1.0),
        ("n", True),
        ("ignore_eos", 1),
        ("stop", [1]),
        ("stop_token_ids", ["a"]),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {1: "a"}),
    ],
)
def test_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(TypeError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("max_tokens", 2**31), ("seed", 2**63)])
def test_integer_beyond_the_wire_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} must fit"):
        SamplingParams(**{field: value})
