"""Plans and step results as plain data, and their translation to and from the wire."""

from dataclasses import dataclass, field

import numpy as np

from nanovllm.v1 import executor_pb2
from nanovllm.wire import (
    Int32Array,
    WireError,
    pack_float32,
    pack_int32,
    unpack_float32,
    unpack_int32,
)
from scheduler_service.block_manager import BlockId
from scheduler_service.sequence import SlotId, SlotSampling, StepId, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Admit:
    """A sequence takes a slot."""

    slot: SlotId
    token_ids: list[int]
    block_ids: list[BlockId]
    num_cached_tokens: int
    num_prompt_tokens: int
    max_total_tokens: int
    min_total_tokens: int
    stop_token_ids: tuple[int, ...]
    sampling: SlotSampling


@dataclass(slots=True)
class Plan:
    """Changes to the batch. Applied in the order: releases, admits, grants, chunks."""

    step_id: StepId
    releases: list[SlotId] = field(default_factory=list)
    admits: list[Admit] = field(default_factory=list)
    grants: list[tuple[SlotId, list[BlockId]]] = field(default_factory=list)
    chunks: list[tuple[SlotId, int]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether the plan says nothing."""
        return not (self.releases or self.admits or self.grants or self.chunks)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Tokens of one iteration; the lists are parallel."""

    applied_step_id: StepId
    slots: list[int]
    token_ids: list[int]
    # 0 goes on, 1 stop token, 2 length.
    finish_flags: bytes
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    iteration: int = 0
    gpu_time_us: int = 0
    idle_time_us: int = 0


FINISH_NONE = 0
FINISH_STOP_TOKEN = 1
FINISH_LENGTH = 2


def encode_plan(plan: Plan) -> executor_pb2.Plan:
    """The plan as a protobuf message."""
    return executor_pb2.Plan(
        step_id=plan.step_id,
        admits=[_encode_admit(admit) for admit in plan.admits],
        grants=executor_pb2.Grants(
            slots=pack_int32([slot for slot, _ in plan.grants]),
            num_blocks=pack_int32([len(blocks) for _, blocks in plan.grants]),
            block_ids=pack_int32([block for _, blocks in plan.grants for block in blocks]),
        ),
        prefill_chunks=executor_pb2.PrefillChunks(
            slots=pack_int32([slot for slot, _ in plan.chunks]),
            num_tokens=pack_int32([count for _, count in plan.chunks]),
        ),
        release_slots=pack_int32(plan.releases),
    )


def _encode_admit(admit: Admit) -> executor_pb2.Admit:
    sampling = admit.sampling
    return executor_pb2.Admit(
        slot=admit.slot,
        token_ids=pack_int32(admit.token_ids),
        block_ids=pack_int32(admit.block_ids),
        num_cached_tokens=admit.num_cached_tokens,
        num_prompt_tokens=admit.num_prompt_tokens,
        max_total_tokens=admit.max_total_tokens,
        min_total_tokens=admit.min_total_tokens,
        stop_token_ids=pack_int32(admit.stop_token_ids),
        sampling=executor_pb2.SlotSampling(
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias_token_ids=pack_int32([token for token, _ in sampling.logit_bias]),
            logit_bias_values=pack_float32([bias for _, bias in sampling.logit_bias]),
            num_logprobs=sampling.num_logprobs,
        ),
    )


def decode_step_result(message: executor_pb2.StepResult) -> StepResult:
    """The message as plain data.

    Raises WireError if its arrays do not fit together or hold what no executor may send.
    """
    slots = unpack_int32(message.slots, "slots").tolist()
    token_ids = _unpack_token_ids(message.token_ids, "token_ids").tolist()
    if not len(slots) == len(token_ids) == len(message.finish_flags):
        raise WireError(
            f"step result has {len(slots)} slots, {len(token_ids)} tokens and "
            f"{len(message.finish_flags)} finish flags"
        )
    return StepResult(
        applied_step_id=StepId(message.applied_step_id),
        slots=slots,
        token_ids=token_ids,
        finish_flags=message.finish_flags,
        logprobs=_decode_logprobs(message.logprobs) if message.HasField("logprobs") else {},
        iteration=message.iteration,
        gpu_time_us=message.gpu_time_us,
        idle_time_us=message.idle_time_us,
    )


def _unpack_token_ids(data: bytes, field: str) -> Int32Array:
    token_ids = unpack_int32(data, field)
    if (token_ids < 0).any():
        raise WireError(f"{field}: {int(token_ids.min())} is no token id")
    return token_ids


def _decode_logprobs(message: executor_pb2.SlotLogprobs) -> dict[int, TokenLogprobs]:
    slots = unpack_int32(message.slots, "logprobs.slots")
    chosen = unpack_float32(message.chosen, "logprobs.chosen")
    num_top = unpack_int32(message.num_top, "logprobs.num_top")
    top_token_ids = _unpack_token_ids(message.top_token_ids, "logprobs.top_token_ids")
    top_logprobs = unpack_float32(message.top_logprobs, "logprobs.top_logprobs")
    if not len(slots) == len(chosen) == len(num_top):
        raise WireError("logprobs: slots, chosen and num_top differ in length")
    if len(top_token_ids) != len(top_logprobs) or len(top_token_ids) != int(num_top.sum()):
        raise WireError("logprobs: num_top does not add up to the number of top tokens")
    if (num_top < 0).any():
        raise WireError("logprobs: num_top is negative")
    ends = np.cumsum(num_top)
    return {
        int(slot): TokenLogprobs(
            chosen=float(chosen[row]),
            top_token_ids=top_token_ids[end - count : end].tolist(),
            top_logprobs=top_logprobs[end - count : end].tolist(),
        )
        for row, (slot, count, end) in enumerate(
            zip(slots.tolist(), num_top.tolist(), ends.tolist(), strict=True)
        )
    }
