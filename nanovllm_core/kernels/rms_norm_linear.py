"""RMSNorm and the linear layer behind it, in one kernel.

    y[r, n] = s[r] * sum_k x[r, k] * W'[n, k] + b[n]        s[r] = (mean_k x[r, k]^2 + eps)^(-1/2)

W' = W * w_norm along K is folded once at load time (`fold_norm_weight`). The row scale s does not
depend on k, so it is applied to the finished sums: x is read once, and the normalised activations
never exist. (RMSNorm: Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.)

Bytes moved: 2 N K for the weight and 2 rows (K + N) for x and y in bf16. Qwen3-0.6B's QKV
(N = 4096, K = 1024) at one row: 8.4 MB, 2.7 us at 3.06 TB/s.

Up to 16 rows of 16-bit values a block holds whole weight rows for the tensor cores, loaded before
it waits for x. Where rows of the weight are too long for that, and in float32, one row of x is
multiplied with plain FMA: a block holds its part of the weight in registers, and no operand passes
through shared memory. Above, tensor cores work on tiles, and up to 32 rows the squares are summed
from the tiles that the product reads anyway.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.checks import require_dtype, require_matrix, require_shape
from nanovllm_core.kernels.device import (
    fence_weight_loads,
    launch_next,
    start_dependents,
    wait_for_previous,
)
from nanovllm_core.kernels.launch import GemvConfig, LinearConfig, ResidentConfig
from nanovllm_core.kernels.linear_tiles import (
    inverse_rms,
    load_activation_row,
    load_resident_weights,
    load_tile,
    load_weight_rows,
    multiply_resident,
    multiply_rows,
    squares_of_rows,
    tile_position,
)


def fold_norm_weight(weight: Tensor, norm_weight: Tensor) -> Tensor:
    """weight * norm_weight along K, computed in float32 and rounded once to weight's dtype.

    Args:
        weight: [N, K].
        norm_weight: [K], of the RMSNorm in front of the linear layer.
    """
    require_shape("norm_weight", norm_weight, (weight.shape[1],))
    return (weight.float() * norm_weight.float()).to(weight.dtype)


@triton.jit
def _gemv_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    n_size,
    eps,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n_size
    w = load_weight_rows(w_ptr, columns, n_size, 0, K, K_PADDED)
    launch_next(DEPENDENT)
    fence_weight_loads(DEPENDENT)
    for row in tl.static_range(ROWS):
        x = load_activation_row(x_ptr, row, 0, K, K_PADDED)
        y = multiply_rows(w, x) * inverse_rms(x, eps, K)
        if HAS_BIAS:
            y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * n_size + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _resident_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    n_size,
    eps,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_K_REST: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    launch_next(DEPENDENT)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n_size
    rows = tl.arange(0, ROWS_PADDED)
    w, w_rest = load_resident_weights(w_ptr, columns, n_size, K, GROUPS, GROUP_K, GROUP_K_REST)
    wait_for_previous(DEPENDENT)
    y, squares = multiply_resident(w, w_rest, x_ptr, rows, ROWS, K, GROUPS, GROUP_K, GROUP_K_REST)
    y *= tl.rsqrt(squares / K + eps)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + rows[None, :] * n_size + columns[:, None],
        y.to(out_ptr.dtype.element_ty),
        mask=(rows < ROWS)[None, :] & inside[:, None],
    )


@triton.jit
def _tile_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    rows,
    n_size,
    eps,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_dependents(DEPENDENT)
    pid_m, pid_n = tile_position(tl.program_id(0), rows, n_size, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if BLOCK_M >= 64:
        squares = squares_of_rows(x_ptr, offs_m, rows, K, BLOCK_M, BLOCK_K)
    else:
        squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        x = load_tile(x_ptr, offs_m, rows, start + offs_k, K, K % BLOCK_K != 0)
        w = load_tile(w_ptr, offs_n, n_size, start + offs_k, K, K % BLOCK_K != 0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if BLOCK_M < 64:
            x32 = x.to(tl.float32)
            squares += tl.sum(x32 * x32, axis=1)
    y = acc * tl.rsqrt(squares / K + eps)[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < n_size, other=0.0)
        y += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + offs_m.to(tl.int64)[:, None] * n_size + offs_n[None, :],
        y.to(out_ptr.dtype.element_ty),
        mask=(offs_m < rows)[:, None] & (offs_n < n_size)[None, :],
    )


def rms_norm_linear(
    x: Tensor,
    folded_weight: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    config: LinearConfig | None = None,
    dependent: bool = False,
    starts_chain: bool = False,
) -> Tensor:
    """RMSNorm(x) @ W^T + bias, with the norm's weight already folded into W.

    Args:
        x: [rows, K] float16, bfloat16 or float32.
        folded_weight: [N, K] of x's dtype, from `fold_norm_weight`.
        eps: the norm's epsilon.
        bias: [N] or None.
        out: [rows, N] of x's dtype to write to; allocated when None.
        config: launch configuration; None takes `launch.RMS_NORM_LINEAR`'s.
        dependent: launch before the previous kernel has ended (programmatic dependent launch,
            compute capability 9.0); that kernel must not write folded_weight.
        starts_chain: launch only after all work in front has ended; with `dependent` the next
            kernel may still start early.

    Returns:
        [rows, N] of x's dtype.

    Raises:
        KernelInputError: a shape, dtype or layout does not fit.
    """
    require_matrix("x", x, None, None)
    rows, k_size = x.shape
    require_matrix("folded_weight", folded_weight, None, k_size)
    require_dtype("folded_weight", folded_weight, x.dtype)
    n_size = folded_weight.shape[0]
    if bias is not None:
        require_shape("bias", bias, (n_size,))
    if out is None:
        out = torch.empty(rows, n_size, dtype=x.dtype, device=x.device)
    else:
        require_matrix("out", out, rows, n_size)
    if rows == 0:
        return out
    if config is None:
        config = launch.choose(launch.RMS_NORM_LINEAR, rows, k_size, x.element_size())
    launched_early = dependent and not starts_chain
    if isinstance(config, GemvConfig):
        k_padded = triton.next_power_of_2(k_size)
        block_n = config.fitted_block_n(k_padded)
        _gemv_kernel[(triton.cdiv(n_size, block_n),)](
            x,
            folded_weight,
            bias,
            out,
            n_size,
            eps,
            K=k_size,
            K_PADDED=k_padded,
            ROWS=rows,
            BLOCK_N=block_n,
            HAS_BIAS=bias is not None,
            DEPENDENT=dependent,
            **config.options(launched_early),
        )
    elif isinstance(config, ResidentConfig):
        _resident_kernel[(triton.cdiv(n_size, config.BLOCK_N),)](
            x,
            folded_weight,
            bias,
            out,
            n_size,
            eps,
            HAS_BIAS=bias is not None,
            DEPENDENT=dependent,
            **config.shape(rows, k_size),
            **config.options(launched_early),
        )
    else:
        grid = (triton.cdiv(rows, config.block_m) * triton.cdiv(n_size, config.block_n),)
        _tile_kernel[grid](
            x,
            folded_weight,
            bias,
            out,
            rows,
            n_size,
            eps,
            K=k_size,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            HAS_BIAS=bias is not None,
            DEPENDENT=dependent,
            **config.options(launched_early),
        )
    return out


def rms_norm_linear_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor, eps: float, bias: Tensor | None = None
) -> Tensor:
    """The unfused definition in float64, from the weight before folding: [rows, N] float64."""
    wide = x.double()
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    y = (wide * scale * norm_weight.double()) @ weight.double().T
    return y if bias is None else y + bias.double()
