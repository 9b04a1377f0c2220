"""Prefill chunks as CUDA graphs: the host uploads one array of indices and launches once.

Kernel by kernel, an iteration with chunks is some 400 launches, 10 to 30 ms of a host's time, while
the device needs less than that for up to several thousand tokens. One graph per number of tokens
fills the cache for up to MAX_CHUNKS chunks of any lengths.

Nothing is sampled here. The last token of a chunk that completes its sequence is left to the decode
graph, in which the slot is a row like any other from then on. Where that token fills a block, it is
computed here as well: another chunk of the same plan may build on the block. The decode graph
computes it again; which of the two, equal up to rounding, another row of that replay reads is not
fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from executor_service.batch_state import BatchState
from executor_service.decode_graphs import slot_tensors
from executor_service.slots import Chunk
from nanovllm_core.attention import AttentionBackend
from nanovllm_core.batch import ChunkIndex, ForwardBatch
from nanovllm_core.fused_model import FusedModel
from nanovllm_core.kernels.paged_prefill import list_tiles, tokens_per_tile
from nanovllm_core.kernels.prefill_step import embed_chunks, start_slots
from nanovllm_core.kv_cache import KVCache

#: Chunks of one replay; more are run in several.
MAX_CHUNKS = 64


def token_sizes(max_num_tokens: int) -> list[int]:
    """Numbers of tokens that get a graph: padding costs a third of the time at most."""
    sizes = [16]
    while sizes[-1] < max_num_tokens:
        power = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(power + power // 2 if sizes[-1] == power else 2 * power)
    return [*(size for size in sizes if size < max_num_tokens), max_num_tokens]


@dataclass(frozen=True, slots=True)
class _Indices:
    """Views of one int32 array: everything that the host tells the device of some chunks."""

    # [tokens] each; padding has a negative position
    token_slots: Tensor
    token_positions: Tensor
    # [MAX_CHUNKS] each
    chunk_slots: Tensor
    num_computed: Tensor
    decodes: Tensor
    context_lens: Tensor
    # [MAX_CHUNKS + 1]
    query_start: Tensor
    # [tiles, 2]; padding has a negative sequence
    tiles: Tensor

    @classmethod
    def of(cls, array: Tensor, num_tokens: int, num_tiles: int) -> "_Indices":
        sizes = [num_tokens] * 2 + [MAX_CHUNKS] * 4 + [MAX_CHUNKS + 1, 2 * num_tiles]
        views = array[: sum(sizes)].split(sizes)
        return cls(
            token_slots=views[0],
            token_positions=views[1],
            chunk_slots=views[2],
            num_computed=views[3],
            decodes=views[4],
            context_lens=views[5],
            query_start=views[6],
            tiles=views[7].view(num_tiles, 2),
        )


class PrefillGraphs:
    """Captured prefills."""

    def __init__(
        self, model: FusedModel, cache: KVCache, attention: AttentionBackend, state: BatchState
    ) -> None:
        """Allocates the buffers; `capture` makes the graphs."""
        limits, device = state.limits, state.device
        self._model = model
        self._cache = cache
        self._attention = attention
        self._state = state
        self._slots = slot_tensors(state)
        self._sizes = token_sizes(limits.max_num_batched_tokens)
        self._tokens_per_tile = tokens_per_tile(model.config.num_heads, model.config.num_kv_heads)
        most = self._sizes[-1]
        self._array = torch.zeros(self._array_size(most), dtype=torch.int32, device=device)
        self._hidden = torch.empty(
            most, model.config.hidden_size, dtype=model.embedding.dtype, device=device
        )
        self._positions = torch.empty(most, dtype=torch.int64, device=device)
        self._slot_mapping = torch.empty(most, dtype=torch.int64, device=device)
        self._block_tables = torch.empty(
            MAX_CHUNKS, limits.max_blocks_per_seq, dtype=torch.int32, device=device
        )
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def capture(self) -> None:
        """Captures all graphs, largest first so that the others reuse its memory."""
        pool = None
        for size in reversed(self._sizes):
            self._upload(size, [])
            # Compiles the kernels and fills the allocator outside the capture.
            self.iterate(size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.iterate(size)
            pool = graph.pool()
            self._graphs[size] = graph
        torch.cuda.synchronize()

    def run(self, chunks: list[Chunk]) -> None:
        """Computes the chunks; slots whose sequence is complete decode from their last token on."""
        for first in range(0, len(chunks), MAX_CHUNKS):
            size = self.stage(chunks[first : first + MAX_CHUNKS])
            if size:
                self._graphs[size].replay()

    def stage(self, chunks: list[Chunk]) -> int:
        """Makes up to MAX_CHUNKS chunks known to the device.

        Returns:
            The number of tokens of the graph to replay; 0 if no token is left for it.
        """
        num_tokens = sum(self._num_tokens(chunk) for chunk in chunks)
        size = next(size for size in self._sizes if size >= num_tokens)
        indices = self._upload(size, chunks)
        start_slots(indices.chunk_slots, indices.num_computed, indices.decodes, self._slots)
        return size if num_tokens else 0

    def iterate(self, size: int) -> None:
        """What a graph holds: `size` tokens of the chunks that were staged last."""
        indices = self._indices(self._array, size)
        hidden, positions = self._hidden[:size], self._positions[:size]
        slot_mapping = self._slot_mapping[:size]
        embed_chunks(
            indices.token_slots,
            indices.token_positions,
            self._slots,
            self._model.embedding,
            hidden,
            positions,
            slot_mapping,
            block_size=self._cache.block_size,
            trash_slot=self._cache.trash_slot,
        )
        torch.index_select(self._state.block_tables, 0, indices.chunk_slots, out=self._block_tables)
        batch = ForwardBatch(
            token_ids=indices.token_slots,
            positions=positions,
            slot_mapping=slot_mapping,
            block_tables=self._block_tables,
            context_lens=indices.context_lens,
            prefill_lens=[size] + [0] * (MAX_CHUNKS - 1),
            prefill_context_lens=[],
            max_decode_context_len=0,
            logits_rows=indices.token_slots[:0],
            chunk_index=ChunkIndex(indices.query_start, indices.tiles),
        )
        self._attention.prepare(batch, self._cache)
        self._model.run_layers(hidden, batch, self._cache, self._attention)

    def _num_tokens(self, chunk: Chunk) -> int:
        """Tokens of the chunk that a graph computes."""
        fills_block = chunk.end % self._cache.block_size == 0
        return chunk.num_tokens - int(chunk.completes and not fills_block)

    def _upload(self, size: int, chunks: list[Chunk]) -> _Indices:
        staged = torch.zeros(
            self._array_size(size), dtype=torch.int32, pin_memory=self._array.is_cuda
        )
        self._fill(self._indices(staged, size), chunks)
        self._array[: staged.shape[0]].copy_(staged, non_blocking=True)
        return self._indices(self._array, size)

    def _fill(self, indices: _Indices, chunks: list[Chunk]) -> None:
        counts = [self._num_tokens(chunk) for chunk in chunks]
        ends = [chunk.start + count for chunk, count in zip(chunks, counts, strict=True)]
        num_computed = [chunk.end - int(chunk.completes) for chunk in chunks]
        slots = [chunk.slot for chunk in chunks]
        _put(indices.token_slots, np.repeat(slots, counts), self._state.dummy_row)
        positions = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
        _put(indices.token_positions, list(chain.from_iterable(positions)), -1)
        _put(indices.chunk_slots, slots, self._state.dummy_row)
        _put(indices.num_computed, num_computed, 0)
        _put(indices.decodes, [chunk.completes for chunk in chunks], 0)
        _put(indices.context_lens, ends, 0)
        starts = np.cumsum([0, *counts])
        _put(indices.query_start, starts, int(starts[-1]))
        tiles = list_tiles(counts, ends, self._tokens_per_tile)
        _put(indices.tiles, tiles, -1)

    def _indices(self, array: Tensor, size: int) -> _Indices:
        return _Indices.of(array, size, self._num_tiles(size))

    def _num_tiles(self, size: int) -> int:
        """Most tiles of `size` tokens: each chunk may end with one that is not full."""
        return size // self._tokens_per_tile + min(size, MAX_CHUNKS)

    def _array_size(self, size: int) -> int:
        return 2 * size + 5 * MAX_CHUNKS + 1 + 2 * self._num_tiles(size)


def _put(view: Tensor, values: Sequence[int] | npt.NDArray, padding: int) -> None:
    """Writes values to the beginning of a tensor of the host, and padding behind them."""
    array = view.numpy()
    array[: len(values)] = values
    array[len(values) :] = padding
