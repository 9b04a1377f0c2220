"""Plans survive the wire, and what is no plan is refused with PlanError and nothing else."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor_service.plan_reader import AdmitOrder, PlanError, read_plan
from nanovllm.v1 import executor_pb2
from nanovllm.wire import pack_float32, pack_int32
from scheduler_service.plan import Admit, Plan, encode_plan
from scheduler_service.sequence import SlotSampling
from tests.executor_service.plans import LIMITS, admit

SLOTS = st.integers(0, LIMITS.max_num_seqs - 1)
BLOCKS = st.integers(0, LIMITS.num_blocks - 1)
TOKENS = st.integers(0, LIMITS.vocab_size - 1)


def floats(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, width=32)


@st.composite
def admits(draw: st.DrawFn) -> Admit:
    token_ids = draw(st.lists(TOKENS, min_size=1, max_size=LIMITS.max_model_len - 1))
    least_blocks = -(-len(token_ids) // LIMITS.block_size)
    biased = draw(st.lists(TOKENS, unique=True, max_size=5))
    return Admit(
        slot=draw(SLOTS),
        token_ids=token_ids,
        block_ids=draw(st.lists(BLOCKS, min_size=least_blocks, max_size=LIMITS.max_blocks_per_seq)),
        num_cached_tokens=draw(st.integers(0, len(token_ids) - 1)),
        num_prompt_tokens=draw(st.integers(1, len(token_ids))),
        max_total_tokens=draw(st.integers(len(token_ids) + 1, LIMITS.max_model_len)),
        min_total_tokens=draw(st.integers(0, LIMITS.max_model_len)),
        stop_token_ids=tuple(draw(st.lists(TOKENS, unique=True, max_size=5))),
        sampling=SlotSampling(
            seed=draw(st.integers(-(2**63), 2**63 - 1)),
            temperature=draw(floats(0, 100)),
            top_k=draw(st.integers(1, LIMITS.vocab_size)),
            top_p=draw(floats(0.125, 1)),
            min_p=draw(floats(0, 1)),
            presence_penalty=draw(floats(-2, 2)),
            frequency_penalty=draw(floats(-2, 2)),
            repetition_penalty=draw(floats(0.125, 8)),
            logit_bias=tuple((token, draw(floats(-100, 100))) for token in biased),
            num_logprobs=draw(st.integers(-1, LIMITS.max_logprobs)),
        ),
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return Plan(
        step_id=draw(st.integers(1, 2**63)),
        releases=draw(st.lists(SLOTS, max_size=4)),
        admits=draw(st.lists(admits(), max_size=2)),
        grants=[
            (slot, draw(st.lists(BLOCKS, min_size=1, max_size=4)))
            for slot in draw(st.lists(SLOTS, unique=True, max_size=4))
        ],
        chunks=[
            (slot, draw(st.integers(1, 90)))
            for slot in draw(st.lists(SLOTS, unique=True, max_size=4))
        ],
    )


def as_admit(order: AdmitOrder) -> Admit:
    sampling = order.sampling
    return Admit(
        slot=order.slot,
        token_ids=order.token_ids.tolist(),
        block_ids=order.block_ids.tolist(),
        num_cached_tokens=order.num_cached_tokens,
        num_prompt_tokens=order.num_prompt_tokens,
        max_total_tokens=order.max_total_tokens,
        min_total_tokens=order.min_total_tokens,
        stop_token_ids=tuple(order.stop_token_ids.tolist()),
        sampling=SlotSampling(
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=tuple(
                zip(sampling.bias_token_ids.tolist(), sampling.bias_values.tolist(), strict=True)
            ),
            num_logprobs=sampling.num_logprobs,
        ),
    )


@given(plans())
@settings(max_examples=100)
def test_the_executor_reads_what_the_scheduler_wrote(plan: Plan):
    wire = executor_pb2.Plan.FromString(encode_plan(plan).SerializeToString())
    order = read_plan(wire, LIMITS)
    assert order.step_id == plan.step_id
    assert order.releases == plan.releases
    assert [as_admit(item) for item in order.admits] == plan.admits
    assert [(slot, blocks.tolist()) for slot, blocks in order.grants] == plan.grants
    assert order.chunks == plan.chunks


ARRAYS = st.one_of(
    st.binary(max_size=17),
    st.lists(st.integers(-2, 70), max_size=6).map(pack_int32),
    st.lists(st.floats(width=32), max_size=6).map(pack_float32),
)
INT32S = st.one_of(st.integers(-2, 100), st.integers(-(2**31), 2**31 - 1))
FLOATS = st.floats(width=32)
ANY_PLANS = st.builds(
    executor_pb2.Plan,
    step_id=st.integers(0, 2**64 - 1),
    admits=st.lists(
        st.builds(
            executor_pb2.Admit,
            slot=INT32S,
            token_ids=ARRAYS,
            block_ids=ARRAYS,
            num_cached_tokens=INT32S,
            num_prompt_tokens=INT32S,
            max_total_tokens=INT32S,
            min_total_tokens=INT32S,
            stop_token_ids=ARRAYS,
            sampling=st.builds(
                executor_pb2.SlotSampling,
                seed=st.integers(-(2**63), 2**63 - 1),
                temperature=FLOATS,
                top_k=INT32S,
                top_p=FLOATS,
                min_p=FLOATS,
                presence_penalty=FLOATS,
                frequency_penalty=FLOATS,
                repetition_penalty=FLOATS,
                logit_bias_token_ids=ARRAYS,
                logit_bias_values=ARRAYS,
                num_logprobs=INT32S,
            ),
        ),
        max_size=2,
    ),
    grants=st.builds(executor_pb2.Grants, slots=ARRAYS, num_blocks=ARRAYS, block_ids=ARRAYS),
    prefill_chunks=st.builds(executor_pb2.PrefillChunks, slots=ARRAYS, num_tokens=ARRAYS),
    release_slots=ARRAYS,
)


@given(ANY_PLANS)
@settings(max_examples=300)
def test_any_message_is_read_or_refused_with_plan_error(message: executor_pb2.Plan):
    try:
        order = read_plan(message, LIMITS)
    except PlanError:
        return
    for item in order.admits:
        assert 0 < len(item.token_ids) < item.max_total_tokens <= LIMITS.max_model_len
        assert len(item.block_ids) * LIMITS.block_size >= len(item.token_ids)
    for _, blocks in order.grants:
        assert len(blocks) >= 1


def message_of(**changes) -> executor_pb2.Plan:
    """A good plan with one field of its admit changed."""
    message = encode_plan(Plan(1, admits=[admit(0, [1, 2, 3, 4, 5], [7, 8])]))
    for name, value in changes.items():
        owner = message.admits[0]
        if name.startswith("sampling_"):
            owner, name = owner.sampling, name.removeprefix("sampling_")
        setattr(owner, name, value)
    return message


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"slot": LIMITS.max_num_seqs}, "slot 6 does not exist"),
        ({"slot": -1}, "slot -1 does not exist"),
        ({"token_ids": pack_int32([1, 320])}, "outside the vocabulary"),
        ({"token_ids": b""}, "0 tokens"),
        ({"token_ids": b"abc"}, "token_ids: 3 bytes"),
        ({"block_ids": pack_int32([7, 64])}, "block is outside"),
        ({"block_ids": pack_int32([7])}, "1 blocks for 5 tokens"),
        ({"block_ids": pack_int32(range(25))}, "25 blocks"),
        ({"num_cached_tokens": 5}, "5 of 5 tokens are cached"),
        ({"num_cached_tokens": -1}, "-1 of 5 tokens are cached"),
        ({"num_prompt_tokens": 0}, "0 of 5 tokens are prompt"),
        ({"num_prompt_tokens": 6}, "6 of 5 tokens are prompt"),
        ({"max_total_tokens": 5}, "a limit of 5"),
        ({"max_total_tokens": 97}, "a limit of 97"),
        ({"stop_token_ids": pack_int32([-1])}, "stop tokens"),
        ({"stop_token_ids": pack_int32([1] * 129)}, "more than 128 stop tokens"),
        ({"sampling_temperature": math.nan}, "finite"),
        ({"sampling_temperature": -0.5}, "out of range"),
        ({"sampling_top_p": 0.0}, "out of range"),
        ({"sampling_repetition_penalty": 0.0}, "out of range"),
        ({"sampling_num_logprobs": 21}, "at most 20"),
        ({"sampling_logit_bias_token_ids": pack_int32([1])}, "1 biased tokens, 0 biases"),
    ],
)
def test_an_admit_that_cannot_be_carried_out_is_refused_with_the_reason(changes, problem):
    read_plan(message_of(), LIMITS)
    with pytest.raises(PlanError, match=problem):
        read_plan(message_of(**changes), LIMITS)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (Plan(1, grants=[(0, [1]), (0, [2])]), "named twice"),
        (Plan(1, grants=[(0, [])]), "do not fit together"),
        (Plan(1, chunks=[(0, 1), (0, 1)]), "repeat"),
        (Plan(1, chunks=[(0, 0)]), "at least one token"),
        (Plan(1, releases=[6]), "release_slots"),
    ],
)
def test_lists_that_contradict_themselves_are_refused(plan: Plan, problem: str):
    with pytest.raises(PlanError, match=problem):
        read_plan(encode_plan(plan), LIMITS)


def test_arrays_are_read_without_copying_tokens():
    message = encode_plan(Plan(1, admits=[admit(0, [1, 2, 3], [4])]))
    token_ids = read_plan(message, LIMITS).admits[0].token_ids
    assert token_ids.dtype == np.int32
    assert not token_ids.flags.owndata
