"""Attention with the flash-attn package for prefill, and for decode where its page size is used.

flash-attn reads a paged cache only in pages of a multiple of 256 tokens, which would make prefix
hits coarse. Prefill therefore reads contiguous keys and values, gathered once per layer; a gather
moves 4 KiB per token and layer of Qwen3-0.6B, a few percent of the layer's time. Captured batches,
whose chunks the host does not know, and decode use this project's own paged kernels; decode uses
flash-attn's where the pages suit it.
"""

from typing import ClassVar

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from nanovllm_core.attention.triton_backend import TritonBackend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache

_PAGE_MULTIPLE = 256
# Contexts of one iteration that are gathered at most, in tokens: 134 MB of Qwen3-0.6B's keys and
# values. Many chunks on long cached prefixes go to the own kernel, which reads the cache in place.
_MAX_GATHERED_TOKENS = 32_768
# Below this many sequences the own kernel splits the context more finely and is faster.
_MIN_DECODE_SEQS = 16


class FlashAttnBackend(TritonBackend):
    """FlashAttention 2 (Dao 2023, https://arxiv.org/abs/2307.08691)."""

    name: ClassVar[str] = "flash_attn"

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._key_start: Tensor | None = None
        self._max_context_len = 0
        # [sum of context_lens] int64: cache slots of the chunks' contexts, in order.
        self._context_slots: Tensor | None = None

    def prepare(self, batch: ForwardBatch, cache: KVCache) -> None:
        """Lists the cache slots of every chunk's context."""
        super().prepare(batch, cache)
        self._context_slots = None
        if batch.chunk_index is not None:
            return  # gathering would need room for the longest contexts in every graph
        if not batch.prefill_lens or sum(batch.prefill_context_lens) > _MAX_GATHERED_TOKENS:
            return
        size = cache.block_size
        starts, slots = [0], []
        for row, length in enumerate(batch.prefill_context_lens):
            starts.append(starts[-1] + length)
            positions = torch.arange(length, device=self.device)
            blocks = batch.block_tables[row, : -(-length // size)].to(torch.int64)
            slots.append(blocks[positions // size] * size + positions % size)
        self._context_slots = torch.cat(slots)
        self._key_start = torch.tensor(starts, dtype=torch.int32, device=self.device)
        self._max_context_len = max(batch.prefill_context_lens)

    def decode_qkv(
        self,
        layer: int,
        qkv: Tensor,
        norm_weights: tuple[Tensor | None, Tensor | None],
        rotation: tuple[Tensor, Tensor],
        cache: KVCache,
        batch: ForwardBatch,
        hidden: Tensor | None = None,
    ) -> Tensor | None:
        """See the base class; None where flash-attn decodes."""
        if self._decodes(cache, qkv.shape[0]):
            return None
        return super().decode_qkv(layer, qkv, norm_weights, rotation, cache, batch, hidden)

    def prefill(
        self, layer: int, query: Tensor, cache: KVCache, batch: ForwardBatch, out: Tensor
    ) -> None:
        """See the base class."""
        if self._context_slots is None:
            super().prefill(layer, query, cache, batch, out)
            return
        key = cache.key[layer].flatten(0, 1).index_select(0, self._context_slots)
        value = cache.value[layer].flatten(0, 1).index_select(0, self._context_slots)
        out.copy_(
            flash_attn_varlen_func(
                query,
                key,
                value,
                self.chunks.query_start,
                self._key_start,
                max(batch.prefill_lens),
                self._max_context_len,
                softmax_scale=self.scale,
                causal=True,
            )
        )

    def decode(
        self, layer: int, query: Tensor, cache: KVCache, block_tables: Tensor, context_lens: Tensor
    ) -> Tensor:
        """See the base class."""
        if not self._decodes(cache, query.shape[0]):
            return super().decode(layer, query, cache, block_tables, context_lens)
        return flash_attn_with_kvcache(
            query.unsqueeze(1),
            cache.key[layer],
            cache.value[layer],
            cache_seqlens=context_lens,
            block_table=block_tables,
            softmax_scale=self.scale,
            causal=True,
        ).squeeze(1)

    @staticmethod
    def _decodes(cache: KVCache, num_seqs: int) -> bool:
        return cache.block_size % _PAGE_MULTIPLE == 0 and num_seqs >= _MIN_DECODE_SEQS
