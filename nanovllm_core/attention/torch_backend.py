"""Attention with PyTorch's scaled_dot_product_attention: the reference, and the one for CPUs."""

from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nanovllm_core.attention.base import AttentionBackend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache


class TorchBackend(AttentionBackend):
    """Gathers each context from the paged cache, then calls scaled_dot_product_attention.

    In decode rows the query heads that share a KV head are passed as query positions of that head:
    with one position and enable_gqa the CPU kernels take 3 to 14 times as long in bfloat16
    (measured with torch 2.13, contexts of 128 to 1024).
    """

    name: ClassVar[str] = "torch"

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__(config, device)
        # [num_blocks of all decode rows] int32 and [num_decode_seqs, 1, 1, max_context]
        self._decode_blocks: Tensor | None = None
        self._decode_mask: Tensor | None = None
        # one per prefill chunk: block ids, and the mask [chunk, context], None for plain causal
        self._prefill: list[tuple[Tensor, Tensor | None]] = []
        # Gathered contexts. Kept on a CPU, where fresh memory of this size costs a page fault per
        # page; a GPU's caching allocator has no such cost, and CUDA graphs must own what they use.
        self._key_scratch: Tensor | None = None
        self._value_scratch: Tensor | None = None

    def prepare(self, batch: ForwardBatch, cache: KVCache) -> None:
        """Builds block lists and masks; see the base class."""
        num_prefill = batch.num_prefill_seqs
        self._prefill = [
            self._plan_chunk(batch.block_tables[row], num_tokens, context, cache)
            for row, (num_tokens, context) in enumerate(
                zip(batch.prefill_lens, batch.prefill_context_lens, strict=True)
            )
        ]
        max_gathered = max((blocks.numel() for blocks, _ in self._prefill), default=0)
        if batch.num_decode_seqs:
            num_blocks = _blocks_for(batch.max_decode_context_len, cache.block_size)
            self._decode_blocks = batch.block_tables[num_prefill:, :num_blocks].flatten()
            max_gathered = max(max_gathered, self._decode_blocks.numel())
            positions = torch.arange(num_blocks * cache.block_size, device=self.device)
            # A padded row attends to one arbitrary position: not every kernel behind
            # scaled_dot_product_attention defines a softmax over nothing.
            visible = positions < batch.context_lens[num_prefill:, None].clamp(min=1)
            self._decode_mask = _additive(visible, cache.key.dtype)[:, None, None, :]
        self._reserve(max_gathered, cache)

    def attend(self, layer: int, query: Tensor, cache: KVCache, batch: ForwardBatch) -> Tensor:
        """See the base class."""
        if not self._prefill:
            return self._decode(layer, query, cache)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        start = 0
        for (blocks, mask), num_tokens, context in zip(
            self._prefill, batch.prefill_lens, batch.prefill_context_lens, strict=True
        ):
            chunk = slice(start, start + num_tokens)
            key, value = self._gather(layer, blocks, cache)
            output[chunk] = _attend_chunk(query[chunk], key[:context], value[:context], mask)
            start += num_tokens
        if batch.num_decode_seqs:
            output[start:] = self._decode(layer, query[start:], cache)
        return output

    def _plan_chunk(
        self, block_table: Tensor, num_tokens: int, context: int, cache: KVCache
    ) -> tuple[Tensor, Tensor | None]:
        blocks = block_table[: _blocks_for(context, cache.block_size)]
        if num_tokens == context:
            return blocks, None
        query_positions = torch.arange(context - num_tokens, context, device=self.device)
        visible = torch.arange(context, device=self.device) <= query_positions[:, None]
        return blocks, _additive(visible, cache.key.dtype)

    def _decode(self, layer: int, query: Tensor, cache: KVCache) -> Tensor:
        if self._decode_blocks is None:
            raise RuntimeError("attend() was called without prepare() for this batch")
        rows, num_heads, head_dim = query.shape
        key, value = self._gather(layer, self._decode_blocks, cache)
        num_kv_heads = key.shape[1]
        output = F.scaled_dot_product_attention(
            query.reshape(rows, num_kv_heads, num_heads // num_kv_heads, head_dim),
            key.view(rows, -1, num_kv_heads, head_dim).transpose(1, 2),
            value.view(rows, -1, num_kv_heads, head_dim).transpose(1, 2),
            attn_mask=self._decode_mask,
        )
        return output.reshape(rows, num_heads, head_dim)

    def _reserve(self, num_blocks: int, cache: KVCache) -> None:
        if self.device.type != "cpu":
            return
        if self._key_scratch is None or self._key_scratch.shape[0] < num_blocks:
            shape = (num_blocks, *cache.key.shape[2:])
            self._key_scratch = cache.key.new_empty(shape)
            self._value_scratch = cache.value.new_empty(shape)

    def _gather(self, layer: int, blocks: Tensor, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Copies blocks; returns key and value [blocks * block_size, num_kv_heads, head_dim]."""
        key = _select(cache.key[layer], blocks, self._key_scratch)
        value = _select(cache.value[layer], blocks, self._value_scratch)
        return key.flatten(0, 1), value.flatten(0, 1)


def _select(pool: Tensor, blocks: Tensor, scratch: Tensor | None) -> Tensor:
    out = None if scratch is None else scratch[: blocks.shape[0]]
    return torch.index_select(pool, 0, blocks, out=out)


def _attend_chunk(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """query [chunk, num_heads, head_dim] over key and value [context, num_kv_heads, head_dim]."""
    output = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=True,
    )
    return output.squeeze(0).transpose(0, 1)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, minus infinity elsewhere."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, float("-inf"))


def _blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)
