"""Decode attention over the paged KV cache, the context split over several blocks (split-KV).

    out[s, h] = softmax(q[s, h] K[s, h / group]^T * scale) V[s, h / group]

A block serves one (sequence, KV head, split): all query heads that share the KV head are rows of
one tensor-core tile, so each key and value is read once. Splits divide a sequence's own context
length evenly in whole tiles; their number is fixed by the launch, their bounds come from device
memory, so one captured graph serves every context length. The block of a (sequence, KV head) that
finishes last combines the splits in the order of their index:

    m = max_i m_i;  out = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i

(Flash-decoding: Dao, Haziza, Massa, Sizov 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.)

Bytes moved: 4 Hkv D context_len per sequence in bf16 for keys and values, 4 KiB a token and layer
for Qwen3-0.6B, plus 8 Hq D per split for partial results.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.attention_tiles import attend_tiles
from nanovllm_core.kernels.checks import (
    KernelInputError,
    require_contiguous,
    require_dtype,
    require_row_values,
    require_shape,
)
from nanovllm_core.kernels.device import arrived_last, start_dependents
from nanovllm_core.kernels.launch import DecodeConfig
from nanovllm_core.kernels.workspace import Workspace

LOG2_E = 1.4426950408889634


@triton.jit
def _divided(acc, total):
    """acc / total, and zero where nothing was summed."""
    return acc / tl.where(total > 0.0, total, 1.0)


@triton.jit
def _combine_splits(
    partial_ptr, stats_ptr, num_splits, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One head's output [BLOCK_D] from the accumulators, maxima and sums of num_splits splits."""
    splits = tl.arange(0, SPLITS)
    offs_d = tl.arange(0, BLOCK_D)
    used = splits < num_splits
    # Written by other blocks of this launch: read past the L1 cache.
    maxima = tl.load(stats_ptr + 2 * splits, mask=used, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(stats_ptr + 2 * splits + 1, mask=used, other=0.0, cache_modifier=".cg")
    acc = tl.load(
        partial_ptr + splits[:, None] * BLOCK_D + offs_d[None, :],
        mask=used[:, None],
        other=0.0,
        cache_modifier=".cg",
    )
    scales = tl.exp2(maxima - tl.max(maxima, axis=0))
    return _divided(tl.sum(acc * scales[:, None], axis=0), tl.sum(sums * scales, axis=0))


@triton.jit
def split_bounds(split, context_len, BLOCK_KV: tl.constexpr, SPLITS: tl.constexpr):
    """First token of a split, the one behind its last, and how many splits have tokens.

    The first split counts in any case; the others begin at or past the end if they are empty.
    """
    num_tiles = tl.cdiv(context_len, BLOCK_KV)
    tiles_per_split = tl.cdiv(num_tiles, SPLITS)
    begin = split * tiles_per_split * BLOCK_KV
    end = min(begin + tiles_per_split * BLOCK_KV, context_len)
    num_used = max(1, tl.cdiv(num_tiles, max(1, tiles_per_split)))
    return begin, end, num_used


@triton.jit
def attend_and_store(
    q,
    running_max,
    running_sum,
    acc,
    begin,
    end,
    num_splits,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    out_ptr,
    partials_ptr,
    stats_ptr,
    counters_ptr,
    scale_log2,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Folds the tokens [begin, end) into this block's running softmax of q [BLOCK_G, BLOCK_D].

    Stores the output if num_splits is one. Else stores the block's part, and the output in the
    block that is last of num_splits.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    stored = group < GROUP
    offs_d = tl.arange(0, BLOCK_D)
    first_head = seq * (NUM_KV_HEADS * GROUP) + kv_head * GROUP
    out_offsets = (first_head + group)[:, None] * HEAD_DIM + offs_d[None, :]
    out_mask = stored[:, None] & (offs_d < HEAD_DIM)[None, :]
    last_position = tl.full([BLOCK_G], 0, dtype=tl.int32) + (end - 1)
    whole_tiles_end = max(begin, end // BLOCK_KV * BLOCK_KV)
    for phase in tl.static_range(2):
        running_max, running_sum, acc = attend_tiles(
            q,
            running_max,
            running_sum,
            acc,
            last_position,
            begin if phase == 0 else whole_tiles_end,
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

    if num_splits == 1:
        y = _divided(acc, running_sum[:, None])
        tl.store(out_ptr + out_offsets, y.to(out_ptr.dtype.element_ty), mask=out_mask)
    elif SPLITS > 1:
        # partials [seqs * heads, SPLITS, BLOCK_D]; stats [seqs * heads, SPLITS, (max, sum)].
        rows = (first_head + group) * SPLITS + split
        tl.store(
            partials_ptr + rows[:, None] * BLOCK_D + offs_d[None, :],
            acc,
            mask=stored[:, None] & (offs_d < BLOCK_D)[None, :],
        )
        tl.store(stats_ptr + 2 * rows, running_max, mask=stored)
        tl.store(stats_ptr + 2 * rows + 1, running_sum, mask=stored)
        if arrived_last(counters_ptr + seq * NUM_KV_HEADS + kv_head, num_splits):
            for member in tl.static_range(GROUP):
                head = first_head + member
                y = _combine_splits(
                    partials_ptr + head * (SPLITS * BLOCK_D),
                    stats_ptr + head * (2 * SPLITS),
                    num_splits,
                    SPLITS,
                    BLOCK_D,
                )
                tl.store(
                    out_ptr + head * HEAD_DIM + offs_d,
                    y.to(out_ptr.dtype.element_ty),
                    mask=offs_d < HEAD_DIM,
                )


@triton.jit
def _decode_kernel(
    q_ptr,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,
    partials_ptr,
    stats_ptr,
    counters_ptr,
    scale_log2,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_dependents(DEPENDENT)
    seq = tl.program_id(2).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    first_head = seq * (NUM_KV_HEADS * GROUP) + tl.program_id(0) * GROUP
    context_len = tl.load(context_lens_ptr + seq)
    split = tl.program_id(1)
    begin, end, num_splits = split_bounds(split, context_len, BLOCK_KV, SPLITS)
    if split >= num_splits:
        return
    q = tl.load(
        q_ptr + (first_head + group)[:, None] * HEAD_DIM + offs_d[None, :],
        mask=(group < GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :],
        other=0.0,
    )
    attend_and_store(
        q,
        tl.full([BLOCK_G], float("-inf"), dtype=tl.float32),
        tl.zeros([BLOCK_G], dtype=tl.float32),
        tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32),
        begin,
        end,
        num_splits,
        key_ptr,
        value_ptr,
        block_tables_ptr,
        out_ptr,
        partials_ptr,
        stats_ptr,
        counters_ptr,
        scale_log2,
        table_stride,
        NUM_KV_HEADS,
        GROUP,
        BLOCK_G,
        HEAD_DIM,
        BLOCK_D,
        PAGE,
        BLOCK_KV,
        SPLITS,
    )


def paged_decode_workspace_size(
    num_seqs: int, num_heads: int, num_kv_heads: int, head_dim: int, config: DecodeConfig
) -> tuple[int, int]:
    """(values, counters) that `paged_decode_attention` needs in a workspace."""
    splits = config.num_splits(num_seqs, num_kv_heads)
    if splits == 1:
        return 0, 0
    rows = num_seqs * num_heads * splits
    return rows * (triton.next_power_of_2(head_dim) + 2), num_seqs * num_kv_heads


def split_buffers(
    kernel: str,
    num_seqs: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    config: DecodeConfig,
    workspace: Workspace | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Accumulators, statistics and counters of a launch's splits; nothing if it has only one.

    Raises:
        KernelInputError: the workspace is missing or too small; names the kernel.
    """
    splits = config.num_splits(num_seqs, num_kv_heads)
    if splits == 1:
        return None, None, None
    needed = paged_decode_workspace_size(num_seqs, num_heads, num_kv_heads, head_dim, config)
    if workspace is None:
        raise KernelInputError(
            f"{kernel} splits {num_seqs} sequences {splits} ways and needs a workspace of "
            f"{needed[0]} values and {needed[1]} counters"
        )
    workspace.require(kernel, *needed)
    num_accumulated = num_seqs * num_heads * splits * triton.next_power_of_2(head_dim)
    return workspace.partials, workspace.partials[num_accumulated:], workspace.counters


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    workspace: Workspace | None = None,
    *,
    out: Tensor | None = None,
    config: DecodeConfig | None = None,
    dependent: bool = False,
) -> Tensor:
    """Attention of one query token per sequence over its cached keys and values.

    Args:
        query: [num_seqs, num_heads, head_dim].
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous;
            block_size a power of two, at least 16.
        block_tables: [num_seqs, max_blocks] int32, rows contiguous; entries past a sequence's
            context are never read.
        context_lens: [num_seqs] int32, cached tokens with the query's own; 0 gives zeros.
        scale: factor on the scores, usually head_dim^(-1/2).
        workspace: needed where the launch splits the context, see `paged_decode_workspace_size`.
        out: [num_seqs, num_heads, head_dim] to write to; allocated when None.
        config: launch configuration; None takes `launch.choose_decode`'s.
        dependent: programmatic dependent launch, see `rms_norm_linear`.

    Returns:
        [num_seqs, num_heads, head_dim] of query's dtype.

    Raises:
        KernelInputError: a shape, dtype or layout does not fit, or the workspace is missing.
    """
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    check_paged_arguments(query, key_cache, value_cache, block_tables, context_lens, num_seqs)
    if out is None:
        out = torch.empty_like(query)
    else:
        require_shape("out", out, tuple(query.shape))
    if num_seqs == 0:
        return out
    block_d = triton.next_power_of_2(head_dim)
    if config is None:
        config = launch.choose_decode(num_seqs).fitted(block_d, query.element_size())
    splits = config.num_splits(num_seqs, num_kv_heads)
    buffers = split_buffers(
        "paged_decode_attention", num_seqs, num_heads, num_kv_heads, head_dim, config, workspace
    )
    group = num_heads // num_kv_heads
    _decode_kernel[(num_kv_heads, splits, num_seqs)](
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        out,
        *buffers,
        scale * LOG2_E,
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        PAGE=block_size,
        BLOCK_KV=config.block_kv,
        SPLITS=splits,
        DEPENDENT=dependent,
        **config.options(dependent),
    )
    return out


def check_paged_arguments(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    num_seqs: int,
) -> None:
    """What decode and prefill require alike.

    Raises:
        KernelInputError: names the argument that does not fit.
    """
    num_heads, head_dim = query.shape[1:]
    if key_cache.dim() != 4 or key_cache.shape[3] != head_dim:
        raise KernelInputError(
            f"key_cache must have shape [num_blocks, block_size, num_kv_heads, {head_dim}], "
            f"got {list(key_cache.shape)}"
        )
    block_size, num_kv_heads = key_cache.shape[1:3]
    if block_size < 16 or block_size & (block_size - 1):
        raise KernelInputError(
            f"block_size must be a power of two and at least 16, got {block_size}"
        )
    if num_heads % num_kv_heads:
        raise KernelInputError(
            f"the {num_heads} query heads must be a multiple of the {num_kv_heads} KV heads"
        )
    require_contiguous("query", query)
    require_shape("key_cache", key_cache, tuple(key_cache.shape))
    require_shape("value_cache", value_cache, tuple(key_cache.shape))
    require_row_values("context_lens", context_lens, num_seqs, torch.int32)
    require_dtype("block_tables", block_tables, torch.int32)
    if block_tables.shape[0] != num_seqs or block_tables.stride(-1) != 1:
        raise KernelInputError(
            f"block_tables must have {num_seqs} contiguous rows, got shape "
            f"{list(block_tables.shape)} with strides {list(block_tables.stride())}"
        )


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention of every query token over its sequence's cache: float64, query's shape.

    Decode is the case of one query token per sequence: query_start = arange(num_seqs + 1).
    """
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    group = query.shape[1] // num_kv_heads
    starts = query_start.tolist()
    for seq, context_len in enumerate(context_lens.tolist()):
        begin, end = starts[seq], starts[seq + 1]
        if context_len == 0 or begin == end:
            continue
        blocks = block_tables[seq, : -(-context_len // block_size)].long()
        keys, values = (
            cache[blocks].reshape(-1, num_kv_heads, head_dim)[:context_len].double()
            for cache in (key_cache, value_cache)
        )
        keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].double(), keys) * scale
        query_positions = torch.arange(context_len - (end - begin), context_len)
        hidden = torch.arange(context_len)[None, :] > query_positions[:, None]
        scores = scores.masked_fill(hidden.to(scores.device), float("-inf"))
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values)
    return out
