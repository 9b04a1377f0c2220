"""One iteration: gathers the batch from the slots, runs the model, samples, updates the slots.

This runner does it step by step and waits for the results; it serves CPUs.

Used by the worker thread only.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from executor_service.batch_state import (
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_NOT_RUN,
    FINISH_STOP_TOKEN,
    BatchState,
    RowValues,
)
from executor_service.runner import SlotLogprobs, StepOutput
from executor_service.slots import Chunk, SlotTable
from nanovllm_core.attention import AttentionBackend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.sampler import SampledTokens, SamplingBatch, sample


class Model(Protocol):
    """What runs a batch: `CausalLM`, or its fused form on a GPU."""

    def __call__(self, batch: ForwardBatch, cache: KVCache, attention: AttentionBackend) -> Tensor:
        """[num_tokens, hidden_size] after the final norm."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, vocab_size] float32."""


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """What an iteration left on the device."""

    # Slots that were sampled.
    slots: list[int]
    # One row per slot; None if there are none.
    sampled: SampledTokens | None
    flags: Tensor

    def results(self) -> Tensor:
        """[2, rows] int32: tokens, then finish flags."""
        if self.sampled is None:
            return torch.empty(2, 0, dtype=torch.int32, device=self.flags.device)
        return torch.stack([self.sampled.token_ids, self.flags.to(torch.int32)])

    def logprobs(self, table: SlotTable) -> "StepLogprobs | None":
        """Log-probabilities, if a slot asked for them."""
        sampled = self.sampled
        if (
            sampled is None
            or sampled.chosen_logprobs is None
            or sampled.top_token_ids is None
            or sampled.top_logprobs is None
        ):
            return None
        return StepLogprobs(
            self.slots,
            [table[slot].sampling.num_logprobs for slot in self.slots],
            sampled.chosen_logprobs,
            sampled.top_token_ids,
            sampled.top_logprobs,
        )


@dataclass(frozen=True, slots=True)
class StepLogprobs:
    """Log-probabilities of an iteration; one row per slot."""

    slots: list[int]
    # Number of most probable tokens that each slot wants; -1: none at all.
    counts: list[int]
    chosen: Tensor
    top_token_ids: Tensor
    top_logprobs: Tensor

    def map(self, move: Callable[[Tensor], Tensor]) -> "StepLogprobs":
        """The same with its tensors elsewhere."""
        return StepLogprobs(
            self.slots,
            self.counts,
            move(self.chosen),
            move(self.top_token_ids),
            move(self.top_logprobs),
        )

    def per_slot(self) -> list[SlotLogprobs]:
        """Each slot that asked, with as many entries as it asked for."""
        chosen = self.chosen.tolist()
        top_token_ids, top_logprobs = self.top_token_ids.tolist(), self.top_logprobs.tolist()
        return [
            SlotLogprobs(slot, chosen[row], top_token_ids[row][:count], top_logprobs[row][:count])
            for row, (slot, count) in enumerate(zip(self.slots, self.counts, strict=True))
            if count >= 0
        ]


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """An iteration whose results are there already."""

    output: StepOutput

    def has_ended(self) -> bool:
        """It has."""
        return True

    def collect(self) -> StepOutput:
        """The results."""
        return self.output


class ModelRunner:
    """Joins model, cache and batch state; see `runner.Runner`."""

    pipeline_depth = 0

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        attention: AttentionBackend,
        state: BatchState,
    ) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._state = state
        self._block_size = cache.block_size
        # End of the iteration before.
        self._ended_s = time.monotonic()

    def launch(
        self, chunks: list[Chunk], decode_slots: list[int], slots: SlotTable
    ) -> FinishedStep:
        """Runs the iteration."""
        started_s = time.monotonic()
        idle_s = started_s - self._ended_s
        step = self.run(chunks, decode_slots, slots)
        token_ids, flags = step.results().tolist()
        logprobs = step.logprobs(slots)
        self._ended_s = time.monotonic()
        return FinishedStep(
            StepOutput(
                slots=step.slots,
                token_ids=token_ids,
                finish_flags=flags,
                logprobs=logprobs.per_slot() if logprobs is not None else [],
                busy_s=self._ended_s - started_s,
                idle_s=idle_s,
            )
        )

    @torch.inference_mode()
    def run(self, chunks: list[Chunk], decode_slots: list[int], slots: SlotTable) -> DeviceStep:
        """Runs the iteration and leaves its results on the device."""
        completed = [chunk.slot for chunk in chunks if chunk.completes]
        sampled_slots = completed + decode_slots
        decode_rows = self._index(decode_slots)
        decode_values = self._state.gather(decode_rows)
        runs = _runs(decode_values)
        batch = self._gather(
            chunks, decode_rows, decode_values.ints("num_computed"), runs, decode_slots, slots
        )
        hidden = self._model(batch, self._cache, self._attention)
        if chunks:
            self._advance_chunks(chunks)
        if not sampled_slots:
            return DeviceStep([], None, self._index([]))
        rows, values = decode_rows, decode_values
        if chunks:
            hidden = hidden[batch.logits_rows]
        if completed:
            rows = self._index(sampled_slots)
            values = self._state.gather(rows)
            runs = torch.cat([runs.new_ones(len(completed)), runs])
        sampling = self._sampling_batch(rows, values, sampled_slots, slots)
        sampled = sample(self._model.logits(hidden), sampling)
        flags = self._append(
            rows, values, sampling, sampled.token_ids, runs, num_completed=len(completed)
        )
        return DeviceStep(sampled_slots, sampled, flags)

    def _gather(
        self,
        chunks: list[Chunk],
        decode_rows: Tensor,
        decode_positions: Tensor,
        runs: Tensor,
        decode_slots: list[int],
        slots: SlotTable,
    ) -> ForwardBatch:
        """Collects the iteration's tokens: prefill chunks first, one token per decoding slot."""
        state = self._state
        token_rows, positions = decode_rows, decode_positions
        context_lens = torch.where(runs, decode_positions + 1, 0)
        seq_rows = decode_rows
        num_prefill_tokens = sum(chunk.num_tokens for chunk in chunks)
        if chunks:
            chunk_rows = np.repeat(
                [chunk.slot for chunk in chunks], [chunk.num_tokens for chunk in chunks]
            )
            chunk_positions = np.concatenate(
                [np.arange(chunk.start, chunk.end) for chunk in chunks]
            )
            token_rows = torch.cat([self._to_device(chunk_rows), decode_rows])
            positions = torch.cat([self._to_device(chunk_positions), decode_positions])
            ends = self._to_device(np.asarray([chunk.end for chunk in chunks]))
            context_lens = torch.cat([ends, context_lens])
            seq_rows = torch.cat([self._index([chunk.slot for chunk in chunks]), decode_rows])
        blocks = state.block_tables[token_rows, positions // self._block_size].to(torch.int64)
        slot_mapping = blocks * self._block_size + positions % self._block_size
        slot_mapping[num_prefill_tokens:].masked_fill_(~runs, self._cache.trash_slot)
        return ForwardBatch(
            token_ids=state.token_ids[token_rows, positions],
            positions=positions,
            slot_mapping=slot_mapping,
            block_tables=state.block_tables[seq_rows],
            context_lens=context_lens.to(torch.int32),
            prefill_lens=[chunk.num_tokens for chunk in chunks],
            prefill_context_lens=[chunk.end for chunk in chunks],
            max_decode_context_len=max(
                (slots[slot].num_computed + 1 for slot in decode_slots), default=0
            ),
            logits_rows=self._logits_rows(chunks, len(decode_slots)),
        )

    def _logits_rows(self, chunks: list[Chunk], num_decode: int) -> Tensor:
        if not chunks:
            return torch.arange(num_decode, device=self._state.device)
        ends = np.cumsum([chunk.num_tokens for chunk in chunks], dtype=np.int64)
        last = [end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.completes]
        first_decode = int(ends[-1])
        decode = np.arange(first_decode, first_decode + num_decode)
        return self._to_device(np.concatenate([np.asarray(last, dtype=np.int64), decode]))

    def _advance_chunks(self, chunks: list[Chunk]) -> None:
        rows = self._index([chunk.slot for chunk in chunks])
        ends = self._to_device(np.asarray([chunk.end for chunk in chunks]))
        self._state.ints("num_computed")[rows] = ends

    def _append(
        self,
        rows: Tensor,
        values: RowValues,
        sampling: SamplingBatch,
        token_ids: Tensor,
        runs: Tensor,
        *,
        num_completed: int,
    ) -> Tensor:
        """Appends the tokens of the rows that run; returns finish flags, [rows]. On the device."""
        state = self._state
        new_index = values.ints("num_tokens")
        kept = state.token_ids[rows, new_index]
        state.token_ids[rows, new_index] = torch.where(runs, token_ids, kept)
        new_length = new_index + runs
        state.ints("num_tokens")[rows] = new_length
        # A completed prefill has computed its last known token with its chunk.
        decode_rows = rows[num_completed:]
        computed = values.ints("num_computed")[num_completed:] + runs[num_completed:]
        state.ints("num_computed")[decode_rows] = computed
        is_stop = (sampling.stop_token_ids == token_ids[:, None]).any(dim=1)
        is_full = new_length >= values.ints("max_total_tokens")
        flags = torch.where(
            is_stop, FINISH_STOP_TOKEN, torch.where(is_full, FINISH_LENGTH, FINISH_NONE)
        )
        was_active = values.ints("active") > 0
        is_active = torch.where(runs, flags == FINISH_NONE, was_active)
        state.ints("active")[rows] = is_active.to(torch.int64)
        return torch.where(runs, flags, FINISH_NOT_RUN)

    def _sampling_batch(
        self, rows: Tensor, values: RowValues, sampled_slots: list[int], slots: SlotTable
    ) -> SamplingBatch:
        state = self._state
        owners = [slots[slot] for slot in sampled_slots]
        samplings = [owner.sampling for owner in owners]
        random = [s for s in samplings if s.temperature > 0]
        vocab_size = state.limits.vocab_size
        any_penalty = any(s.has_penalty for s in samplings)
        longest = max(owner.num_tokens for owner in owners)
        # What only some requests need is only read for them; copying it is not free.
        history_len = longest if any_penalty else 1
        num_biases = max(len(s.bias_token_ids) for s in samplings)
        num_tokens = values.ints("num_tokens")
        truncating = [s for s in random if s.top_p < 1 or 0 < s.top_k < vocab_size]
        return SamplingBatch(
            temperature=values.floats("temperature"),
            top_p=values.floats("top_p"),
            min_p=values.floats("min_p"),
            top_k=values.ints("top_k").to(torch.int32),
            seeds=values.ints("seed"),
            positions=num_tokens,
            presence_penalty=values.floats("presence_penalty"),
            frequency_penalty=values.floats("frequency_penalty"),
            repetition_penalty=values.floats("repetition_penalty"),
            token_ids=state.token_ids[rows, :history_len],
            num_prompt_tokens=values.ints("num_prompt_tokens"),
            num_tokens=num_tokens,
            bias_token_ids=state.bias_token_ids[rows, :num_biases],
            bias_values=state.bias_values[rows, :num_biases],
            stop_token_ids=state.stop_token_ids[rows],
            min_total_tokens=values.ints("min_total_tokens"),
            any_random=bool(random),
            any_filter=bool(truncating) or any(s.min_p > 0 for s in random),
            any_penalty=any_penalty,
            any_bias=num_biases > 0,
            any_min_tokens=any(owner.num_tokens < owner.min_total_tokens for owner in owners),
            max_logprobs=max(s.num_logprobs for s in samplings),
            max_top_k=max((s.top_k for s in truncating), default=0)
            if all(0 < s.top_k < vocab_size for s in truncating)
            else 0,
        )

    def _index(self, slots: list[int]) -> Tensor:
        return self._to_device(np.asarray(slots, dtype=np.int64))

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._state.device, non_blocking=True)


def _runs(values: RowValues) -> Tensor:
    """Which decode rows really decode, [rows] bool: neither finished nor out of blocks."""
    has_room = values.ints("num_computed") < values.ints("capacity")
    return (values.ints("active") > 0) & has_room
