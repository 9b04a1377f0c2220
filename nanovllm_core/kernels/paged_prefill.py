"""Chunked-prefill attention over the paged KV cache, sequences of different lengths in one launch.

The chunk's keys and values are in the cache already. Query token i of a sequence with n query
tokens and context_len cached tokens stands at position context_len - n + i and sees every token up
to itself:

    out[i, h] = softmax_{j <= pos(i)}(q[i, h] . K[j, h / group] * scale) V[j, h / group]

Rows of a score tile are (token, query head of the group) pairs, so the heads that share a KV head
also share its tiles. Which tiles there are is read from a list on the device (`list_tiles`), so
that a captured graph serves any chunks that its list has room for. Tiles wholly in the past are
folded in without masks; the last tiles, which the causal diagonal crosses, with.
(FlashAttention-2: Dao 2023, https://arxiv.org/abs/2307.08691.)

Arithmetic: 4 Hq D flops per visible (query, key) pair; matrix-bound from some 100 query tokens up.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.attention_tiles import attend_tiles
from nanovllm_core.kernels.checks import (
    KernelInputError,
    require_dtype,
    require_matrix,
    require_row_values,
    require_shape,
)
from nanovllm_core.kernels.launch import PrefillConfig
from nanovllm_core.kernels.paged_decode import LOG2_E, check_paged_arguments


@triton.jit
def _prefill_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    query_start_ptr,
    context_lens_ptr,
    tiles_ptr,
    out_ptr,
    scale_log2,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    seq = tl.load(tiles_ptr + 2 * tl.program_id(0)).to(tl.int64)
    if seq < 0:
        return
    first_token = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    query_begin = tl.load(query_start_ptr + seq)
    num_queries = tl.load(query_start_ptr + seq + 1) - query_begin
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP_PADDED
    context_len = tl.load(context_lens_ptr + seq)
    first_position = context_len - num_queries + first_token

    rows = tl.arange(0, BLOCK_M)
    tokens = first_token + rows // GROUP_PADDED
    members = rows % GROUP_PADDED
    offs_d = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + members
    q_rows = (query_begin + tokens).to(tl.int64) * (NUM_KV_HEADS * GROUP) + heads
    q_offsets = q_rows[:, None] * HEAD_DIM + offs_d[None, :]
    row_mask = (tokens < num_queries) & (members < GROUP)
    q_mask = row_mask[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)

    running_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    query_positions = context_len - num_queries + tokens
    # Every row sees the tokens up to first_position; none sees past the tile's last query.
    whole_tiles_end = (first_position + 1) // BLOCK_KV * BLOCK_KV
    end = min(first_position + tokens_per_tile, context_len)
    for phase in tl.static_range(2):
        running_max, running_sum, acc = attend_tiles(
            q,
            running_max,
            running_sum,
            acc,
            query_positions,
            0 if phase == 0 else whole_tiles_end,
            whole_tiles_end if phase == 0 else end,
            block_tables_ptr + seq * table_stride,
            key_ptr + kv_head * HEAD_DIM,
            value_ptr + kv_head * HEAD_DIM,
            scale_log2,
            NUM_KV_HEADS * HEAD_DIM,
            HEAD_DIM,
            BLOCK_D,
            PAGE,
            BLOCK_KV,
            phase == 1,
        )
    y = acc / running_sum[:, None]
    tl.store(out_ptr + q_offsets, y.to(out_ptr.dtype.element_ty), mask=q_mask)


def tokens_per_tile(
    num_heads: int, num_kv_heads: int, config: PrefillConfig = launch.PAGED_PREFILL
) -> int:
    """Query tokens of one tile. Raises KernelInputError if not even one fits."""
    group = num_heads // num_kv_heads
    group_padded = triton.next_power_of_2(group)
    if group_padded > config.block_m:
        raise KernelInputError(
            f"a launch with block_m {config.block_m} takes at most that many query heads per KV "
            f"head, got {group}"
        )
    return config.block_m // group_padded


def list_tiles(
    query_lens: Sequence[int], context_lens: Sequence[int], num_tokens: int
) -> npt.NDArray[np.int32]:
    """The tiles of some chunks: [tiles, 2], sequence and first query token within its chunk.

    Those that see the most keys come first, so that they do not end last. `num_tokens` is the query
    tokens of a tile.
    """
    tiles = [
        (context_len - query_len + first, seq, first)
        for seq, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True))
        for first in range(0, query_len, num_tokens)
    ]
    tiles.sort(reverse=True)
    return np.asarray([tile[1:] for tile in tiles], dtype=np.int32).reshape(-1, 2)


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    tiles: Tensor,
    scale: float,
    *,
    out: Tensor | None = None,
    config: PrefillConfig = launch.PAGED_PREFILL,
) -> Tensor:
    """Causal attention of several query tokens per sequence over the paged cache.

    Args:
        query: [num_tokens, num_heads, head_dim], sequences one after another.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous;
            block_size a power of two, at least 16.
        block_tables: [num_seqs, max_blocks] int32, rows contiguous.
        query_start: [num_seqs + 1] int32, first query row of each sequence and the end.
        context_lens: [num_seqs] int32, cached tokens with the chunk's own; at least as many as
            the sequence has query tokens.
        tiles: [num_tiles, 2] int32, from `list_tiles`; rows of a negative sequence are nothing.
        scale: factor on the scores, usually head_dim^(-1/2).
        out: [num_tokens, num_heads, head_dim] to write to; allocated when None.
        config: launch configuration.

    Returns:
        [num_tokens, num_heads, head_dim] of query's dtype. Rows past query_start[-1] are not
        written.

    Raises:
        KernelInputError: a shape, dtype or layout does not fit.
    """
    num_heads, head_dim = query.shape[1:]
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_seqs = block_tables.shape[0]
    check_paged_arguments(query, key_cache, value_cache, block_tables, context_lens, num_seqs)
    require_row_values("query_start", query_start, num_seqs + 1, torch.int32)
    require_matrix("tiles", tiles, None, 2)
    require_dtype("tiles", tiles, torch.int32)
    group_padded = config.block_m // tokens_per_tile(num_heads, num_kv_heads, config)
    if out is None:
        out = torch.empty_like(query)
    else:
        require_shape("out", out, tuple(query.shape))
    if tiles.shape[0] == 0:
        return out
    _prefill_kernel[(tiles.shape[0], num_kv_heads)](
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        context_lens,
        tiles,
        out,
        scale * LOG2_E,
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        GROUP_PADDED=group_padded,
        BLOCK_M=config.block_m,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        PAGE=block_size,
        BLOCK_KV=config.block_kv,
        **config.options(),
    )
    return out
