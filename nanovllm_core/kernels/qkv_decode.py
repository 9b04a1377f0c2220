"""Decode attention straight from the QKV projection: norm, rotation, cache write and attention.

`qk_norm_rope_cache` and `paged_decode_attention` in one kernel, for one token per sequence. Every
block of a (sequence, KV head) normalises and rotates its query heads anew, which costs less than a
launch. The first split also makes the new token's key, writes key and value to the cache, and
starts its running softmax from them; the cache is read up to the token before.

So nothing that is read of the cache comes from the projection in front, and with few sequences a
block loads its first tile of keys and values while that projection still runs.

Bytes moved: those of `paged_decode`, and the projection's row once per split instead of a query
that passes through memory.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.attention_tiles import cache_slots, fold_tile
from nanovllm_core.kernels.checks import (
    KernelInputError,
    require_dtype,
    require_matrix,
    require_row_values,
    require_shape,
    require_unscaled_input,
)
from nanovllm_core.kernels.device import launch_next, start_dependents, wait_for_previous
from nanovllm_core.kernels.launch import DecodeConfig
from nanovllm_core.kernels.linear_tiles import inverse_rms, load_activation_row
from nanovllm_core.kernels.paged_decode import (
    LOG2_E,
    attend_and_store,
    check_paged_arguments,
    split_bounds,
    split_buffers,
)
from nanovllm_core.kernels.workspace import Workspace


@triton.jit
def _partners(HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rotation pairs dimension d with d + D/2: every dimension's partner, [BLOCK_D]."""
    dims = tl.arange(0, BLOCK_D)
    half = HEAD_DIM // 2
    return tl.where(dims < half, dims + half, dims - half)


@triton.jit
def _load_rotation(cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Factors of a dimension and of its partner: two float32 [BLOCK_D]."""
    dims = tl.arange(0, BLOCK_D)
    half = HEAD_DIM // 2
    cos = tl.load(cos_ptr + dims % half, mask=dims < HEAD_DIM, other=0.0)
    sin = tl.load(sin_ptr + dims % half, mask=dims < HEAD_DIM, other=0.0)
    return cos, tl.where(dims < half, -sin, sin)


@triton.jit
def _with_norm(
    weight_ptr, cos, sin, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, NORMED: tl.constexpr
):
    """The factors of `_load_rotation` with the norm's weights multiplied in."""
    if NORMED:
        inside = tl.arange(0, BLOCK_D) < HEAD_DIM
        partners = _partners(HEAD_DIM, BLOCK_D)
        weight_at = weight_ptr + tl.arange(0, BLOCK_D)
        cos *= tl.load(weight_at, mask=inside, other=0.0).to(tl.float32)
        sin *= tl.load(weight_ptr + partners, mask=inside, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def _rotated_heads(
    heads_ptr,
    mask,
    cos,
    sin,
    scale,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Norm and rotation of heads [n, BLOCK_D] in float32; heads_ptr points at each head's start.

    Loading every element's partner beside it keeps the layout that the attention's products need.
    cos and sin are those of `_with_norm`; scale is that of the norm in front of the projection.
    """
    dims = tl.arange(0, BLOCK_D)
    whole = mask & (dims < HEAD_DIM)[None, :]
    x = tl.load(heads_ptr + dims[None, :], mask=whole, other=0.0).to(tl.float32) * scale
    partners = _partners(HEAD_DIM, BLOCK_D)
    partner = tl.load(heads_ptr + partners[None, :], mask=whole, other=0.0).to(tl.float32)
    rotated = x * cos[None, :] + partner * (scale * sin)[None, :]
    if NORMED:
        rotated *= tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
    return rotated


@triton.jit
def _qkv_decode_kernel(
    qkv_ptr,
    hidden_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slot_mapping_ptr,
    key_ptr,
    value_ptr,
    block_tables_ptr,
    context_lens_ptr,
    out_ptr,
    partials_ptr,
    stats_ptr,
    counters_ptr,
    eps,
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
    EARLY_TILE: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    NORMED: tl.constexpr,
    HOLDS_BACK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    if not EARLY_TILE:
        start_dependents(DEPENDENT)
    elif not HOLDS_BACK:
        launch_next(DEPENDENT)
    # Up to the wait nothing is read that the projection in front writes: lengths and tables are
    # from the beginning of the iteration, the cache up to the token before from earlier ones.
    context_len = tl.load(context_lens_ptr + seq)
    position = tl.load(positions_ptr + seq)
    slot = tl.load(slot_mapping_ptr + seq)
    begin, end, num_splits = split_bounds(split, context_len - 1, BLOCK_KV, SPLITS)
    if split >= num_splits:
        return
    cos, sin = _load_rotation(
        cos_ptr + position * (HEAD_DIM // 2),
        sin_ptr + position * (HEAD_DIM // 2),
        HEAD_DIM,
        BLOCK_D,
    )
    q_cos, q_sin = _with_norm(q_weight_ptr, cos, sin, HEAD_DIM, BLOCK_D, NORMED)
    k_cos, k_sin = _with_norm(k_weight_ptr, cos, sin, HEAD_DIM, BLOCK_D, NORMED)
    if EARLY_TILE:
        positions = begin + tl.arange(0, BLOCK_KV)
        table_ptr = block_tables_ptr + seq * table_stride
        slots = cache_slots(table_ptr, begin, positions, end, PAGE, BLOCK_KV, True)
        offsets = (slots[:, None] * NUM_KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
        tile_mask = (positions < end)[:, None] & (dims < HEAD_DIM)[None, :]
        early_k = tl.load(key_ptr + offsets, mask=tile_mask, other=0.0)
        early_v = tl.load(value_ptr + offsets, mask=tile_mask, other=0.0)
        wait_for_previous(DEPENDENT)
        if HOLDS_BACK:
            launch_next(DEPENDENT)
    num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    scale = 1.0
    if HIDDEN > 0:
        hidden = load_activation_row(hidden_ptr, seq, 0, HIDDEN, HIDDEN_PADDED)
        scale = inverse_rms(hidden, eps, HIDDEN)
    row = qkv_ptr + seq * ((num_heads + 2 * NUM_KV_HEADS) * HEAD_DIM)

    group = tl.arange(0, BLOCK_G)
    q_rows = row + (kv_head * GROUP + group)[:, None] * HEAD_DIM
    q = _rotated_heads(
        q_rows, (group < GROUP)[:, None], q_cos, q_sin, scale, eps, HEAD_DIM, BLOCK_D, NORMED
    ).to(key_ptr.dtype.element_ty)
    running_max = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros([BLOCK_G], dtype=tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    if (split == 0) & (context_len > 0):
        one = tl.arange(0, 1)
        inside = (dims < HEAD_DIM)[None, :]
        k_row = row + (num_heads + kv_head) * HEAD_DIM + one[:, None]
        key = _rotated_heads(
            k_row, one[:, None] == 0, k_cos, k_sin, scale, eps, HEAD_DIM, BLOCK_D, NORMED
        ).to(key_ptr.dtype.element_ty)
        v_row = row + (num_heads + NUM_KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
        value = tl.load(v_row, mask=inside, other=0.0)
        value = (value.to(tl.float32) * scale).to(value_ptr.dtype.element_ty)
        target = (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM + dims[None, :]
        tl.store(key_ptr + target, key, mask=inside)
        tl.store(value_ptr + target, value, mask=inside)
        products = q.to(tl.float32) * key.to(tl.float32)
        running_max = tl.sum(products, axis=1) * scale_log2
        running_sum = tl.full([BLOCK_G], 1.0, dtype=tl.float32)
        acc = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32) + value.to(tl.float32)
    if EARLY_TILE:
        if begin < end:
            last_position = tl.full([BLOCK_G], 0, dtype=tl.int32) + (end - 1)
            running_max, running_sum, acc = fold_tile(
                q,
                early_k,
                early_v,
                running_max,
                running_sum,
                acc,
                positions,
                last_position,
                scale_log2,
                True,
            )
        begin += BLOCK_KV
    attend_and_store(
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
        NUM_KV_HEADS,
        GROUP,
        BLOCK_G,
        HEAD_DIM,
        BLOCK_D,
        PAGE,
        BLOCK_KV,
        SPLITS,
    )


def qkv_decode_attention(
    qkv: Tensor,
    q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    num_heads: int,
    scale: float,
    workspace: Workspace | None = None,
    *,
    hidden: Tensor | None = None,
    config: DecodeConfig | None = None,
    dependent: bool = False,
) -> Tensor:
    """Attention of one new token per sequence, whose KV it adds to the cache.

    Args:
        qkv: [num_seqs, (num_heads + 2 * num_kv_heads) * head_dim].
        q_norm_weight, k_norm_weight: [head_dim] each, or both None for models without QK norm.
        eps: the norms' epsilon.
        cos, sin: [max_len, head_dim / 2] float32.
        positions: [num_seqs] int64, below max_len.
        slot_mapping: [num_seqs] int64: the cache slot of position context_lens - 1.
        key_cache, value_cache, block_tables, context_lens: as in `paged_decode_attention`; rows
            with a context of 0 write nothing and come out as zeros.
        num_heads: query heads.
        scale: factor on the scores.
        workspace: needed where the launch splits the context, see `paged_decode_workspace_size`.
        hidden: what qkv lacks the scale of, as in `qk_norm_rope_cache`.
        config: launch configuration; None takes `launch.choose_decode`'s.
        dependent: programmatic dependent launch, see `rms_norm_linear`.

    Returns:
        [num_seqs, num_heads, head_dim] of qkv's dtype.

    Raises:
        KernelInputError: a shape, dtype or layout does not fit, or the workspace is missing.
    """
    num_seqs = qkv.shape[0]
    block_size, num_kv_heads, head_dim = key_cache.shape[1:]
    require_matrix("qkv", qkv, num_seqs, (num_heads + 2 * num_kv_heads) * head_dim)
    hidden_size = require_unscaled_input(hidden, qkv)
    out = torch.empty(num_seqs, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    check_paged_arguments(out, key_cache, value_cache, block_tables, context_lens, num_seqs)
    require_row_values("positions", positions, num_seqs, torch.int64)
    require_row_values("slot_mapping", slot_mapping, num_seqs, torch.int64)
    for name, table in (("cos", cos), ("sin", sin)):
        require_shape(name, table, (table.shape[0], head_dim // 2))
        require_dtype(name, table, torch.float32)
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise KernelInputError("q_norm_weight and k_norm_weight must be given together")
    if num_seqs == 0:
        return out
    block_d = triton.next_power_of_2(head_dim)
    if config is None:
        config = launch.choose_decode(num_seqs).fitted(block_d, qkv.element_size())
    splits = config.num_splits(num_seqs, num_kv_heads)
    buffers = split_buffers(
        "qkv_decode_attention", num_seqs, num_heads, num_kv_heads, head_dim, config, workspace
    )
    group = num_heads // num_kv_heads
    _qkv_decode_kernel[(num_kv_heads, splits, num_seqs)](
        qkv,
        hidden,
        q_norm_weight,
        k_norm_weight,
        cos,
        sin,
        positions,
        slot_mapping,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        out,
        *buffers,
        eps,
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
        EARLY_TILE=config.early_tile,
        HIDDEN=hidden_size,
        HIDDEN_PADDED=triton.next_power_of_2(hidden_size),
        NORMED=q_norm_weight is not None,
        HOLDS_BACK=not launch.gate_up_holds_back(num_seqs),
        DEPENDENT=dependent,
        **config.options(dependent),
    )
    return out
