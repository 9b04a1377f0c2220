"""Attention with FlashAttention 3 for prefill, if the package `flash_attn_interface` is installed.

It reads the paged cache in place, pages of any size, and takes chunks of different lengths in one
call, so nothing is gathered and captured prefills use it too. Decode is this project's own paged
kernel. (Shah et al. 2024, https://arxiv.org/abs/2407.08608.)

Nobody has measured it here: `auto` never chooses it.
"""

from typing import ClassVar

from flash_attn_interface import flash_attn_with_kvcache
from torch import Tensor

from nanovllm_core.attention.triton_backend import TritonBackend
from nanovllm_core.batch import ForwardBatch
from nanovllm_core.kv_cache import KVCache


class FlashAttn3Backend(TritonBackend):
    """FlashAttention 3, for Hopper GPUs."""

    name: ClassVar[str] = "flash_attn_3"

    def prefill(
        self, layer: int, query: Tensor, cache: KVCache, batch: ForwardBatch, out: Tensor
    ) -> None:
        """See the base class."""
        num_prefill = batch.num_prefill_seqs
        out.copy_(
            flash_attn_with_kvcache(
                query,
                cache.key[layer],
                cache.value[layer],
                cache_seqlens=batch.context_lens[:num_prefill],
                page_table=batch.block_tables[:num_prefill],
                cu_seqlens_q=self.chunks.query_start,
                # An upper bound where the batch is captured.
                max_seqlen_q=max(batch.prefill_lens),
                softmax_scale=self.scale,
                causal=True,
            )
        )
