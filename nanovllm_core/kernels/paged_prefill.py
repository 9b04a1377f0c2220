"""Chunked-prefill attention over the paged KV cache, sequences of different lengths in one launch.

The chunk's keys and values are in the cache already. Query token i of a sequence with n query
tokens and context_len cached tokens stands at position context_len - n + i and sees every token up
to itself:

    out[i, h] = softmax_{j <= pos(i)}(q[i, h] . K[j, h / group] * scale) V[j, h / group]

Rows of a score tile are (token, query head of the group) pairs, so the heads that share a KV head
also share its tiles. Tiles wholly in the past are folded in without masks; the last tiles, which
the causal diagonal crosses, with. (FlashAttention-2: Dao 2023, https://arxiv.org/abs/2307.08691.)

Arithmetic: 4 Hq D flops per visible (query, key) pair; matrix-bound from some 100 query tokens up.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.attention_tiles import attend_tiles
from nanovllm_core.kernels.checks import KernelInputError, require_row_values, require_shape
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
    seq = tl.program_id(2).to(tl.int64)
    kv_head = tl.program_id(1)
    query_begin = tl.load(query_start_ptr + seq)
    num_queries = tl.load(query_start_ptr + seq + 1) - query_begin
    # The last tiles see the most keys: start them first, so that they do not end last.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP_PADDED
    first_token = tile * tokens_per_tile
    if first_token >= num_queries:
        return
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


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query_len: int,
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
        max_query_len: host upper bound of query tokens per sequence; fixes the grid.
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
    group = num_heads // num_kv_heads
    group_padded = triton.next_power_of_2(group)
    if group_padded > config.block_m:
        raise KernelInputError(
            f"a launch with block_m {config.block_m} takes at most that many query heads per KV "
            f"head, got {group}"
        )
    if out is None:
        out = torch.empty_like(query)
    else:
        require_shape("out", out, tuple(query.shape))
    if num_seqs == 0 or max_query_len <= 0:
        return out
    tiles = triton.cdiv(max_query_len, config.block_m // group_padded)
    _prefill_kernel[(tiles, num_kv_heads, num_seqs)](
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        context_lens,
        out,
        scale * LOG2_E,
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PADDED=group_padded,
        BLOCK_M=config.block_m,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        PAGE=block_size,
        BLOCK_KV=config.block_kv,
        **config.options(),
    )
    return out
