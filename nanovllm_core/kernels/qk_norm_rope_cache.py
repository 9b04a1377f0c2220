"""Per-head RMSNorm of q and k, rotary embedding and the write of k and v into the paged cache.

From one fused projection row [q heads | k heads | v heads], each of head_dim D:

    h   = head * (mean(head^2) + eps)^(-1/2) * w        for q and k, where the model has QK norm
    out = [h1 cos - h2 sin, h2 cos + h1 sin]            h = [h1, h2]: halves, not pairs ("neox")
    q -> q_out[token, head],  k -> key_cache[slot, head],  v (unchanged) -> value_cache[slot, head]

A projection may have left out the scale of the RMSNorm in front of it, which is the same for a
whole row: then head is (mean(hidden^2) + eps)^(-1/2) times what the row holds, for v as well.

(RoPE: Su et al. 2021, https://arxiv.org/abs/2104.09864.) cos and sin are float32 tables
[max_len, D / 2] indexed by the token's position, scaling included.

Bytes moved per token in bf16: 2 D (Hq + 2 Hkv) read and as many written, plus 4 D for the table
rows; Qwen3-0.6B: 16.5 KiB. A block handles a few heads of one kind of one token.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels.checks import (
    KernelInputError,
    require_dtype,
    require_matrix,
    require_row_values,
    require_shape,
    require_unscaled_input,
)
from nanovllm_core.kernels.device import start_dependents
from nanovllm_core.kernels.launch import launch_options
from nanovllm_core.kernels.linear_tiles import inverse_rms, load_activation_row

# Heads per block: 8 heads of 128 are two 16-byte accesses for each of 64 threads, while one token
# of Qwen3-0.6B still spreads over 4 blocks.
_HEADS_PER_BLOCK = 8
_NUM_WARPS = 2


@triton.jit
def _store_halves(ptr, heads, head_limit, low, high, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    offsets = tl.arange(0, BLOCK_HALF)
    mask = (heads < head_limit)[:, None] & (offsets < HALF)[None, :]
    target = ptr + heads[:, None] * (2 * HALF) + offsets[None, :]
    tl.store(target, low.to(ptr.dtype.element_ty), mask=mask)
    tl.store(target + HALF, high.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _norm_and_rotate(
    low,
    high,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    position,
    eps,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORMED: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK_HALF)
    inside = offsets < HALF
    if NORMED:
        squares = tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        weight_low = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        weight_high = tl.load(weight_ptr + HALF + offsets, mask=inside, other=0.0).to(tl.float32)
        low = low * scale * weight_low[None, :]
        high = high * scale * weight_high[None, :]
    cos = tl.load(cos_ptr + position * HALF + offsets, mask=inside, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * HALF + offsets, mask=inside, other=0.0)[None, :]
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _qk_norm_rope_cache_kernel(
    qkv_ptr,
    hidden_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slot_mapping_ptr,
    q_out_ptr,
    key_cache_ptr,
    value_cache_ptr,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HEADS: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    KV_GROUPS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
    NORMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_dependents(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    if group < Q_GROUPS:
        local_group = group
        first_head = 0
        head_limit = NUM_HEADS
    elif group < Q_GROUPS + KV_GROUPS:
        local_group = group - Q_GROUPS
        first_head = NUM_HEADS
        head_limit = NUM_KV_HEADS
    else:
        local_group = group - Q_GROUPS - KV_GROUPS
        first_head = NUM_HEADS + NUM_KV_HEADS
        head_limit = NUM_KV_HEADS
    heads = local_group * HEADS + tl.arange(0, HEADS)
    offsets = tl.arange(0, BLOCK_HALF)
    mask = (heads < head_limit)[:, None] & (offsets < HALF)[None, :]
    row = token * (NUM_HEADS + 2 * NUM_KV_HEADS) + first_head
    source = qkv_ptr + row * (2 * HALF) + heads[:, None] * (2 * HALF) + offsets[None, :]
    low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if HIDDEN > 0:
        hidden = load_activation_row(hidden_ptr, token, 0, HIDDEN, HIDDEN_PADDED)
        scale = inverse_rms(hidden, eps, HIDDEN)
        low *= scale
        high *= scale

    position = tl.load(positions_ptr + token)
    slot = tl.load(slot_mapping_ptr + token)
    cache_offset = slot * (NUM_KV_HEADS * 2 * HALF)
    if group < Q_GROUPS:
        low, high = _norm_and_rotate(
            low, high, q_weight_ptr, cos_ptr, sin_ptr, position, eps, HALF, BLOCK_HALF, NORMED
        )
        q_out = q_out_ptr + token * (NUM_HEADS * 2 * HALF)
        _store_halves(q_out, heads, head_limit, low, high, HALF, BLOCK_HALF)
    elif group < Q_GROUPS + KV_GROUPS:
        low, high = _norm_and_rotate(
            low, high, k_weight_ptr, cos_ptr, sin_ptr, position, eps, HALF, BLOCK_HALF, NORMED
        )
        _store_halves(key_cache_ptr + cache_offset, heads, head_limit, low, high, HALF, BLOCK_HALF)
    else:
        _store_halves(
            value_cache_ptr + cache_offset, heads, head_limit, low, high, HALF, BLOCK_HALF
        )


def qk_norm_rope_cache(
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
    num_heads: int,
    *,
    hidden: Tensor | None = None,
    dependent: bool = False,
) -> Tensor:
    """Normalise and rotate q and k, and write k and v to their cache slots.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
        q_norm_weight, k_norm_weight: [head_dim] each, or both None for models without QK norm.
        eps: the norms' epsilon.
        cos, sin: [max_len, head_dim / 2] float32; every position must lie below max_len.
        positions: [num_tokens] int64.
        slot_mapping: [num_tokens] int64, block * block_size + offset; all different, except that
            several padded rows may share a slot that nobody reads.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_dim] of one layer,
            contiguous, written in place.
        num_heads: query heads.
        hidden: what qkv lacks the scale of, as in `silu_and_mul`, with the same eps.
        dependent: programmatic dependent launch, see `rms_norm_linear`.

    Returns:
        q: [num_tokens, num_heads, head_dim] of qkv's dtype.

    Raises:
        KernelInputError: a shape, dtype or layout does not fit.
    """
    if key_cache.dim() != 4:
        raise KernelInputError(
            "key_cache must have shape [num_blocks, block_size, num_kv_heads, head_dim], got "
            f"{list(key_cache.shape)}"
        )
    num_kv_heads, head_dim = key_cache.shape[2:]
    num_tokens = qkv.shape[0]
    half = head_dim // 2
    require_matrix("qkv", qkv, None, (num_heads + 2 * num_kv_heads) * head_dim)
    hidden_size = require_unscaled_input(hidden, qkv)
    require_shape("value_cache", value_cache, tuple(key_cache.shape))
    require_shape("key_cache", key_cache, tuple(key_cache.shape))
    require_matrix("cos", cos, None, half)
    require_shape("sin", sin, tuple(cos.shape))
    require_dtype("cos", cos, torch.float32)
    require_dtype("sin", sin, torch.float32)
    require_row_values("positions", positions, num_tokens, torch.int64)
    require_row_values("slot_mapping", slot_mapping, num_tokens, torch.int64)
    if (q_norm_weight is None) != (k_norm_weight is None):
        raise KernelInputError("give both q_norm_weight and k_norm_weight, or neither")
    if q_norm_weight is not None and k_norm_weight is not None:
        require_shape("q_norm_weight", q_norm_weight, (head_dim,))
        require_shape("k_norm_weight", k_norm_weight, (head_dim,))
    q_out = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q_out
    q_groups = triton.cdiv(num_heads, _HEADS_PER_BLOCK)
    kv_groups = triton.cdiv(num_kv_heads, _HEADS_PER_BLOCK)
    _qk_norm_rope_cache_kernel[(num_tokens, q_groups + 2 * kv_groups)](
        qkv,
        hidden,
        q_norm_weight,
        k_norm_weight,
        cos,
        sin,
        positions,
        slot_mapping,
        q_out,
        key_cache,
        value_cache,
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=half,
        BLOCK_HALF=triton.next_power_of_2(half),
        HEADS=_HEADS_PER_BLOCK,
        Q_GROUPS=q_groups,
        KV_GROUPS=kv_groups,
        HIDDEN=hidden_size,
        HIDDEN_PADDED=triton.next_power_of_2(hidden_size),
        NORMED=q_norm_weight is not None,
        DEPENDENT=dependent,
        **launch_options(_NUM_WARPS, 1, dependent),
    )
    return q_out


def qk_norm_rope_reference(
    heads: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
) -> Tensor:
    """Norm and rotation of one kind of heads: [num_tokens, heads, head_dim] to float64 likewise."""
    wide = heads.double()
    if norm_weight is not None:
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
        wide = wide * scale * norm_weight.double()
    low, high = wide.chunk(2, dim=-1)
    cos_rows = cos.double()[positions][:, None, :]
    sin_rows = sin.double()[positions][:, None, :]
    return torch.cat([low * cos_rows - high * sin_rows, high * cos_rows + low * sin_rows], dim=-1)
