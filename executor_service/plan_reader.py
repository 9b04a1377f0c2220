"""Plans from the wire as numpy arrays, checked against what this executor can hold.

Checks that need the state of slots are made where plans are applied (`slots.py`).
"""

from dataclasses import dataclass

import numpy as np

from nanovllm.v1 import executor_pb2
from nanovllm.wire import Float32Array, Int32Array, WireError, unpack_float32, unpack_int32


class PlanError(ValueError):
    """A plan broke the protocol; the session that sent it is over."""


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """What one executor process can hold."""

    vocab_size: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_stop_token_ids: int = 128
    max_logit_biases: int = 256
    max_logprobs: int = 20

    @property
    def max_blocks_per_seq(self) -> int:
        """Longest block table."""
        return -(-self.max_model_len // self.block_size)


@dataclass(frozen=True, slots=True)
class SlotSampling:
    """How a slot's tokens are chosen; the fields are explained in executor.proto."""

    seed: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    bias_token_ids: Int32Array
    bias_values: Float32Array
    num_logprobs: int

    @property
    def has_penalty(self) -> bool:
        """Whether the logits depend on the tokens so far."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass(frozen=True, slots=True)
class AdmitOrder:
    """A sequence takes a slot."""

    slot: int
    token_ids: Int32Array
    block_ids: Int32Array
    num_cached_tokens: int
    num_prompt_tokens: int
    max_total_tokens: int
    min_total_tokens: int
    stop_token_ids: Int32Array
    sampling: SlotSampling


@dataclass(frozen=True, slots=True)
class PlanOrder:
    """One plan. Applied in the order: releases, admits, grants; then its chunks run."""

    step_id: int
    releases: list[int]
    admits: list[AdmitOrder]
    grants: list[tuple[int, Int32Array]]
    # slot, number of tokens
    chunks: list[tuple[int, int]]


def read_plan(message: executor_pb2.Plan, limits: ExecutorLimits) -> PlanOrder:
    """Checks shapes and ranges. Raises PlanError."""
    try:
        return PlanOrder(
            step_id=message.step_id,
            releases=_slots(message.release_slots, "release_slots", limits),
            admits=[_read_admit(admit, limits) for admit in message.admits],
            grants=_read_grants(message.grants, limits),
            chunks=_read_chunks(message.prefill_chunks, limits),
        )
    except WireError as error:
        raise PlanError(f"plan {message.step_id}: {error}") from error


def _read_admit(message: executor_pb2.Admit, limits: ExecutorLimits) -> AdmitOrder:
    slot = message.slot
    if not 0 <= slot < limits.max_num_seqs:
        raise PlanError(f"slot {slot} does not exist")
    token_ids = unpack_int32(message.token_ids, "token_ids")
    block_ids = _blocks(message.block_ids, "block_ids", limits)
    stop_token_ids = unpack_int32(message.stop_token_ids, "stop_token_ids")
    _check_ids(token_ids, f"tokens of slot {slot}", limits.vocab_size)
    _check_ids(stop_token_ids, f"stop tokens of slot {slot}", limits.vocab_size)
    known = len(token_ids)
    if not 0 < known < message.max_total_tokens <= limits.max_model_len:
        raise PlanError(
            f"slot {slot}: {known} tokens and a limit of {message.max_total_tokens} do not fit a "
            f"model length of {limits.max_model_len}"
        )
    if not 0 <= message.num_cached_tokens < known:
        raise PlanError(f"slot {slot}: {message.num_cached_tokens} of {known} tokens are cached")
    if not 0 < message.num_prompt_tokens <= known:
        raise PlanError(f"slot {slot}: {message.num_prompt_tokens} of {known} tokens are prompt")
    if len(block_ids) * limits.block_size < known or len(block_ids) > limits.max_blocks_per_seq:
        raise PlanError(f"slot {slot}: {len(block_ids)} blocks for {known} tokens")
    if len(stop_token_ids) > limits.max_stop_token_ids:
        raise PlanError(f"slot {slot}: more than {limits.max_stop_token_ids} stop tokens")
    return AdmitOrder(
        slot=slot,
        token_ids=token_ids,
        block_ids=block_ids,
        num_cached_tokens=message.num_cached_tokens,
        num_prompt_tokens=message.num_prompt_tokens,
        max_total_tokens=message.max_total_tokens,
        min_total_tokens=message.min_total_tokens,
        stop_token_ids=stop_token_ids,
        sampling=_read_sampling(message.sampling, slot, limits),
    )


def _read_sampling(
    message: executor_pb2.SlotSampling, slot: int, limits: ExecutorLimits
) -> SlotSampling:
    bias_token_ids = unpack_int32(message.logit_bias_token_ids, "logit_bias_token_ids")
    bias_values = unpack_float32(message.logit_bias_values, "logit_bias_values")
    _check_ids(bias_token_ids, f"logit bias of slot {slot}", limits.vocab_size)
    if len(bias_token_ids) != len(bias_values) or len(bias_values) > limits.max_logit_biases:
        raise PlanError(
            f"slot {slot}: {len(bias_token_ids)} biased tokens, {len(bias_values)} biases, at "
            f"most {limits.max_logit_biases}"
        )
    numbers = (
        message.temperature,
        message.top_p,
        message.min_p,
        message.presence_penalty,
        message.frequency_penalty,
        message.repetition_penalty,
    )
    if not np.isfinite(numbers).all() or not np.isfinite(bias_values).all():
        raise PlanError(f"slot {slot}: sampling parameters must be finite")
    if message.temperature < 0 or message.top_p <= 0 or message.repetition_penalty <= 0:
        raise PlanError(f"slot {slot}: temperature, top_p or repetition_penalty out of range")
    if not -1 <= message.num_logprobs <= limits.max_logprobs:
        raise PlanError(f"slot {slot}: at most {limits.max_logprobs} log-probabilities")
    return SlotSampling(
        seed=message.seed,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        bias_token_ids=bias_token_ids,
        bias_values=bias_values,
        num_logprobs=message.num_logprobs,
    )


def _read_grants(
    message: executor_pb2.Grants, limits: ExecutorLimits
) -> list[tuple[int, Int32Array]]:
    slots = _slots(message.slots, "grants.slots", limits)
    counts = unpack_int32(message.num_blocks, "grants.num_blocks")
    blocks = _blocks(message.block_ids, "grants.block_ids", limits)
    if len(slots) != len(counts) or (counts < 1).any() or int(counts.sum()) != len(blocks):
        raise PlanError("grants: slots, num_blocks and block_ids do not fit together")
    if len(set(slots)) != len(slots):
        raise PlanError("grants: a slot is named twice")
    ends = np.cumsum(counts)
    return [
        (slot, blocks[end - count : end])
        for slot, count, end in zip(slots, counts.tolist(), ends.tolist(), strict=True)
    ]


def _read_chunks(
    message: executor_pb2.PrefillChunks, limits: ExecutorLimits
) -> list[tuple[int, int]]:
    slots = _slots(message.slots, "prefill_chunks.slots", limits)
    counts = unpack_int32(message.num_tokens, "prefill_chunks.num_tokens").tolist()
    if len(slots) != len(counts) or len(set(slots)) != len(slots):
        raise PlanError("prefill_chunks: slots repeat or do not match num_tokens")
    if any(count < 1 for count in counts):
        raise PlanError("prefill_chunks: a chunk needs at least one token")
    return list(zip(slots, counts, strict=True))


def _slots(data: bytes, field: str, limits: ExecutorLimits) -> list[int]:
    slots = unpack_int32(data, field)
    if len(slots) and not (slots.min() >= 0 and slots.max() < limits.max_num_seqs):
        raise PlanError(f"{field}: a slot is outside [0, {limits.max_num_seqs})")
    return slots.tolist()


def _blocks(data: bytes, field: str, limits: ExecutorLimits) -> Int32Array:
    blocks = unpack_int32(data, field)
    if len(blocks) and not (blocks.min() >= 0 and blocks.max() < limits.num_blocks):
        raise PlanError(f"{field}: a block is outside [0, {limits.num_blocks})")
    return blocks


def _check_ids(token_ids: Int32Array, what: str, vocab_size: int) -> None:
    if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        raise PlanError(f"{what}: an id is outside the vocabulary [0, {vocab_size})")
