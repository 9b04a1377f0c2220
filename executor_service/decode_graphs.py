"""Whole decode iterations as CUDA graphs: from slot state to appended tokens without the host.

One graph per number of rows and kind of sampling. Replays read and write only the slot state and
the buffers here, so that replay can follow replay; the host merely names the slots when the set of
decoding slots changes.
"""

from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor

from executor_service.batch_state import BatchState
from executor_service.plan_reader import SlotSampling
from nanovllm_core.attention import AttentionBackend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.fused_model import FusedModel
from nanovllm_core.kernels.decode_step import (
    DecodeInputs,
    SlotTensors,
    append_tokens,
    gather_decode_inputs,
)
from nanovllm_core.kernels.filter_threshold import MAX_CANDIDATE_TOP_K, filter_thresholds
from nanovllm_core.kernels.sampling import sample_tokens
from nanovllm_core.kv_cache import KVCache


class SamplingKind(Enum):
    """What a graph's sampler can do; each does what those before it do."""

    # Greedy and temperature.
    PLAIN = 0
    # top_p and min_p too, where every row with top_p has a top_k of at most MAX_CANDIDATE_TOP_K.
    TOP_K = 1
    # Any top_k, top_p and min_p.
    FILTERED = 2


def sampling_kind(samplings: Iterable[SlotSampling], vocab_size: int) -> SamplingKind:
    """The least that all slots of a batch need."""
    kind = SamplingKind.PLAIN
    for sampling in samplings:
        if sampling.temperature <= 0:
            continue
        if 0 < sampling.top_k <= MAX_CANDIDATE_TOP_K:
            kind = max(kind, SamplingKind.TOP_K, key=lambda each: each.value)
        elif 0 < sampling.top_k < vocab_size or sampling.top_p < 1:
            return SamplingKind.FILTERED
        elif sampling.min_p > 0:
            kind = max(kind, SamplingKind.TOP_K, key=lambda each: each.value)
    return kind


def bucket_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of rows that get a graph: fine where a step is short, and always the largest."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, 257, 32), *range(320, max_num_seqs, 64)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def slot_tensors(state: BatchState) -> SlotTensors:
    """The slot state as kernels take it."""
    return SlotTensors(
        token_ids=state.token_ids,
        block_tables=state.block_tables,
        stop_token_ids=state.stop_token_ids,
        num_tokens=state.ints("num_tokens"),
        num_computed=state.ints("num_computed"),
        max_total_tokens=state.ints("max_total_tokens"),
        capacity=state.ints("capacity"),
        active=state.ints("active"),
        seed=state.ints("seed"),
        top_k=state.ints("top_k"),
        temperature=state.floats("temperature"),
        top_p=state.floats("top_p"),
        min_p=state.floats("min_p"),
    )


class DecodeGraphs:
    """Captured decode iterations."""

    def __init__(
        self, model: FusedModel, cache: KVCache, attention: AttentionBackend, state: BatchState
    ) -> None:
        """Allocates the buffers; `capture` makes the graphs."""
        limits = state.limits
        device = state.device
        self._model = model
        self._cache = cache
        self._attention = attention
        self._state = state
        self._slots = slot_tensors(state)
        self._sizes = bucket_sizes(limits.max_num_seqs)
        rows = limits.max_num_seqs
        self._inputs = DecodeInputs.allocate(
            rows,
            model.config.hidden_size,
            limits.max_blocks_per_seq,
            model.embedding.dtype,
            device,
        )
        self._slot_ids = torch.full((rows,), state.dummy_row, dtype=torch.int64, device=device)
        self._results = torch.empty(2 * rows, dtype=torch.int32, device=device)
        self._current: list[int] = []
        self._graphs: dict[tuple[int, SamplingKind], torch.cuda.CUDAGraph] = {}

    def bucket(self, num_rows: int) -> int:
        """The number of rows of the graph that holds `num_rows`."""
        return next(size for size in self._sizes if size >= num_rows)

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures all graphs, largest first so that the others reuse its memory."""
        pool = None
        for size in reversed(self._sizes):
            for kind in SamplingKind:
                # Compiles the kernels and fills the allocator outside the capture.
                self.iterate(size, kind)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self.iterate(size, kind)
                pool = graph.pool()
                self._graphs[size, kind] = graph
        torch.cuda.synchronize()

    def replay(self, slots: list[int], kind: SamplingKind) -> Tensor:
        """Starts one iteration over `slots`; without any there is nothing to start.

        Returns:
            [2, rows of the bucket] int32, tokens and finish flags; overwritten by the next replay.
        """
        if not slots:
            return self.results(0)
        size = self.bucket(len(slots))
        self.name_slots(slots)
        self._graphs[size, kind].replay()
        return self.results(size)

    def name_slots(self, slots: list[int]) -> None:
        """Tells the device which slots decode; the rows behind them are padding."""
        if slots == self._current:
            return
        padded = slots + [self._state.dummy_row] * (self._slot_ids.shape[0] - len(slots))
        staged = torch.tensor(padded, pin_memory=self._slot_ids.is_cuda)
        self._slot_ids.copy_(staged, non_blocking=True)
        self._current = list(slots)

    def results(self, size: int) -> Tensor:
        """[2, size] int32: tokens and finish flags of the last iteration."""
        return self._results[: 2 * size].view(2, size)

    def iterate(self, size: int, kind: SamplingKind) -> None:
        """What a graph holds: one iteration over the first `size` slots that were named."""
        inputs = self._inputs.first(size)
        slot_ids = self._slot_ids[:size]
        gather_decode_inputs(
            slot_ids,
            self._slots,
            self._model.embedding,
            inputs,
            block_size=self._cache.block_size,
            trash_slot=self._cache.trash_slot,
        )
        batch = ForwardBatch(
            token_ids=slot_ids,
            positions=inputs.positions,
            slot_mapping=inputs.slot_mapping,
            block_tables=inputs.block_tables,
            context_lens=inputs.context_lens,
            prefill_lens=[],
            prefill_context_lens=[],
            max_decode_context_len=self._state.limits.max_model_len,
            logits_rows=slot_ids,
        )
        self._attention.prepare(batch, self._cache)
        hidden = self._model.run_layers(inputs.hidden, batch, self._cache, self._attention)
        token_ids = self._sample(hidden, inputs, kind)
        append_tokens(
            slot_ids,
            token_ids,
            inputs.context_lens,
            self._slots,
            self.results(size),
            dependent=self._model.dependent,
        )

    def _sample(self, hidden: Tensor, inputs: DecodeInputs, kind: SamplingKind) -> Tensor:
        keys = (inputs.temperature, inputs.seeds, inputs.draw_positions)
        dependent = self._model.dependent
        if kind is SamplingKind.PLAIN:
            token_ids = self._model.sample_head(hidden, *keys)
            if token_ids is not None:
                return token_ids
            logits = self._model.raw_logits(self._model.final_norm(hidden))
            return sample_tokens(logits, *keys, dependent=dependent)
        logits = self._model.logits(self._model.final_norm(hidden))
        threshold = filter_thresholds(
            logits,
            inputs.temperature,
            inputs.top_k,
            inputs.top_p,
            inputs.min_p,
            max_top_k=MAX_CANDIDATE_TOP_K if kind is SamplingKind.TOP_K else 0,
        )
        return sample_tokens(logits, *keys, threshold=threshold, dependent=dependent)
