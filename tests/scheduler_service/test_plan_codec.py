"""Step results from the wire; plans to the wire are tested where the executor reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.v1 import executor_pb2
from nanovllm.wire import WireError, pack_float32, pack_int32
from scheduler_service.plan import Plan, decode_step_result, encode_plan
from scheduler_service.sequence import TokenLogprobs


def test_an_empty_plan_is_empty_on_the_wire():
    plan = Plan(5)
    assert plan.is_empty
    message = encode_plan(plan)
    assert message.step_id == 5
    assert not message.admits
    assert message.release_slots == message.grants.slots == message.prefill_chunks.slots == b""


def test_log_probabilities_are_split_by_slot():
    message = executor_pb2.StepResult(
        iteration=4,
        applied_step_id=9,
        slots=pack_int32([5, 2, 7]),
        token_ids=pack_int32([10, 20, 30]),
        finish_flags=b"\0\1\2",
        logprobs=executor_pb2.SlotLogprobs(
            slots=pack_int32([2, 5]),
            chosen=pack_float32([-0.5, -0.25]),
            num_top=pack_int32([0, 2]),
            top_token_ids=pack_int32([10, 11]),
            top_logprobs=pack_float32([-0.25, -4.0]),
        ),
        gpu_time_us=100,
        idle_time_us=3,
    )
    result = decode_step_result(message)
    assert (result.slots, result.token_ids) == ([5, 2, 7], [10, 20, 30])
    assert result.finish_flags == b"\0\1\2"
    assert (result.iteration, result.applied_step_id) == (4, 9)
    assert (result.gpu_time_us, result.idle_time_us) == (100, 3)
    assert result.logprobs == {
        2: TokenLogprobs(-0.5, [], []),
        5: TokenLogprobs(-0.25, [10, 11], [-0.25, -4.0]),
    }


def logprobs(**changes) -> executor_pb2.StepResult:
    fields = {
        "slots": pack_int32([1]),
        "chosen": pack_float32([-1.0]),
        "num_top": pack_int32([1]),
        "top_token_ids": pack_int32([3]),
        "top_logprobs": pack_float32([-1.0]),
    }
    return executor_pb2.StepResult(logprobs=executor_pb2.SlotLogprobs(**(fields | changes)))


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (executor_pb2.StepResult(slots=b"xyz"), "slots: 3 bytes"),
        (executor_pb2.StepResult(slots=pack_int32([1])), "1 slots, 0 tokens and 0 finish flags"),
        (executor_pb2.StepResult(finish_flags=b"\0"), "0 slots, 0 tokens and 1 finish flags"),
        (
            executor_pb2.StepResult(
                slots=pack_int32([1]), token_ids=pack_int32([-3]), finish_flags=b"\0"
            ),
            "token_ids: -3 is no token id",
        ),
        (logprobs(chosen=b""), "differ in length"),
        (logprobs(num_top=pack_int32([2])), "does not add up"),
        (logprobs(top_logprobs=b""), "does not add up"),
        (
            logprobs(
                slots=pack_int32([1, 2]),
                chosen=pack_float32([0, 0]),
                num_top=pack_int32([2, -1]),
            ),
            "negative",
        ),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(message, problem: str):
    with pytest.raises(WireError, match=problem):
        decode_step_result(message)


ARRAYS = st.one_of(st.binary(max_size=9), st.lists(st.integers(-2, 3), max_size=3).map(pack_int32))


@given(
    st.builds(
        executor_pb2.StepResult,
        slots=ARRAYS,
        token_ids=ARRAYS,
        finish_flags=st.binary(max_size=3),
        logprobs=st.builds(
            executor_pb2.SlotLogprobs,
            slots=ARRAYS,
            chosen=ARRAYS,
            num_top=ARRAYS,
            top_token_ids=ARRAYS,
            top_logprobs=ARRAYS,
        ),
    )
)
def test_any_message_is_decoded_or_refused_with_wire_error(message: executor_pb2.StepResult):
    try:
        result = decode_step_result(message)
    except WireError:
        return
    assert len(result.slots) == len(result.token_ids) == len(result.finish_flags)
