"""Attention with this project's own Triton kernels, for pages of 16 tokens and powers of two up."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from nanovllm_core.attention.base import AttentionBackend
from nanovllm_core.batch import ChunkIndex, ForwardBatch
from nanovllm_core.config import ModelConfig
from nanovllm_core.kernels import launch
from nanovllm_core.kernels.device import supports_dependent_launch
from nanovllm_core.kernels.paged_decode import paged_decode_attention, paged_decode_workspace_size
from nanovllm_core.kernels.paged_prefill import (
    list_tiles,
    paged_prefill_attention,
    tokens_per_tile,
)
from nanovllm_core.kernels.qkv_decode import qkv_decode_attention
from nanovllm_core.kernels.workspace import Workspace
from nanovllm_core.kv_cache import KVCache


class TritonBackend(AttentionBackend):
    """Reads the paged cache in place, in prefill and decode."""

    name: ClassVar[str] = "triton"

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self.scale = config.head_dim**-0.5
        self._workspace = _decode_workspace(config, device)
        # The kernel may be launched while the one before it finishes.
        self._dependent = supports_dependent_launch(device)
        self._tokens_per_tile = tokens_per_tile(config.num_heads, config.num_kv_heads)
        # Of the chunks at hand.
        self._chunks: ChunkIndex | None = None

    def prepare(self, batch: ForwardBatch, cache: KVCache) -> None:
        """Notes where the chunks lie."""
        self._chunks = batch.chunk_index
        if batch.prefill_lens and self._chunks is None:
            starts = np.cumsum([0, *batch.prefill_lens], dtype=np.int32)
            tiles = list_tiles(
                batch.prefill_lens, batch.prefill_context_lens, self._tokens_per_tile
            )
            self._chunks = ChunkIndex(
                torch.from_numpy(starts).to(self.device), torch.from_numpy(tiles).to(self.device)
            )

    @property
    def chunks(self) -> ChunkIndex:
        """Where the chunks of the prepared batch lie. Raises RuntimeError if there are none."""
        if self._chunks is None:
            raise RuntimeError("no batch with prefill chunks was prepared")
        return self._chunks

    def attend(self, layer: int, query: Tensor, cache: KVCache, batch: ForwardBatch) -> Tensor:
        """See the base class."""
        num_prefill = batch.num_prefill_seqs
        if not num_prefill:
            return self.decode(layer, query, cache, batch.block_tables, batch.context_lens)
        num_tokens = batch.num_prefill_tokens
        out = torch.empty_like(query)
        self.prefill(layer, query[:num_tokens], cache, batch, out[:num_tokens])
        if batch.num_decode_seqs:
            out[num_tokens:] = self.decode(
                layer,
                query[num_tokens:],
                cache,
                batch.block_tables[num_prefill:],
                batch.context_lens[num_prefill:],
            )
        return out

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
        """Norm, rotation, cache write and attention of decode rows in one kernel.

        Args:
            layer: index of the layer.
            qkv: [rows, (num_heads + 2 * num_kv_heads) * head_dim] of a batch without chunks.
            norm_weights: of q and k, [head_dim] each or None.
            rotation: tables of cos and sin.
            cache, batch: as in `attend`.
            hidden: what qkv lacks the norm's scale of, see `qk_norm_rope_cache`.

        Returns:
            [rows, num_heads, head_dim], or None where this backend decodes in another way.
        """
        return qkv_decode_attention(
            qkv,
            *norm_weights,
            self.config.rms_norm_eps,
            *rotation,
            batch.positions,
            batch.slot_mapping,
            cache.key[layer],
            cache.value[layer],
            batch.block_tables,
            batch.context_lens,
            self.config.num_heads,
            self.scale,
            self._workspace,
            hidden=hidden,
            dependent=self._dependent,
        )

    def prefill(
        self, layer: int, query: Tensor, cache: KVCache, batch: ForwardBatch, out: Tensor
    ) -> None:
        """Attention of the prefill chunks into `out`."""
        num_prefill = batch.num_prefill_seqs
        paged_prefill_attention(
            query,
            cache.key[layer],
            cache.value[layer],
            batch.block_tables[:num_prefill],
            self.chunks.query_start,
            batch.context_lens[:num_prefill],
            self.chunks.tiles,
            self.scale,
            out=out,
        )

    def decode(
        self, layer: int, query: Tensor, cache: KVCache, block_tables: Tensor, context_lens: Tensor
    ) -> Tensor:
        """Attention of one token per sequence."""
        return paged_decode_attention(
            query,
            cache.key[layer],
            cache.value[layer],
            block_tables,
            context_lens,
            self.scale,
            self._workspace,
            dependent=self._dependent,
        )


def _decode_workspace(config: ModelConfig, device: torch.device) -> Workspace:
    """Large enough for every number of sequences: few are split many ways, many not at all."""
    most_split = max(each.target_blocks for _, each in launch.decode_table())
    sizes = [
        paged_decode_workspace_size(
            num_seqs,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            launch.choose_decode(num_seqs),
        )
        for num_seqs in range(1, most_split + 1)
    ]
    return Workspace.allocate(
        max(values for values, _ in sizes), max(counters for _, counters in sizes), device
    )
