"""Residual add and RMSNorm in one pass, or the norm alone.

    residual += x;   out = residual * (mean(residual^2) + eps)^(-1/2) * w

Bytes moved per row of H values in bf16: 2 H read for x and for residual each, 2 H written for
residual and for out each: 8 H, against 10 H for an add and a norm that pass the sum through memory,
and one launch instead of two, which is what counts at few rows.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels.checks import require_matrix, require_shape
from nanovllm_core.kernels.device import start_dependents
from nanovllm_core.kernels.launch import launch_options


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    offsets = tl.arange(0, BLOCK)
    inside = offsets < HIDDEN
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    start_dependents(DEPENDENT)
    base = tl.program_id(0).to(tl.int64) * HIDDEN
    total = tl.load(residual_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        x = tl.load(x_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
        # The norm sees the sum as it is stored, as an unfused add followed by a norm does.
        stored = (x + total).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + base + offsets, stored, mask=inside)
        total = stored.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, axis=0) / HIDDEN + eps)
    y = (total * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + base + offsets, y, mask=inside)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, dependent: bool = False
) -> Tensor:
    """Add x to residual in place and return the normalised sum.

    Args:
        x: [rows, hidden].
        residual: [rows, hidden] of x's dtype, updated in place.
        weight: [hidden], the norm's weight.
        eps: the norm's epsilon.
        dependent: programmatic dependent launch, see `rms_norm_linear`.

    Returns:
        [rows, hidden] of x's dtype.

    Raises:
        KernelInputError: a shape or layout does not fit.
    """
    require_matrix("x", x, *residual.shape)
    return _launch(x, residual, weight, eps, dependent)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, dependent: bool = False) -> Tensor:
    """x * (mean(x^2) + eps)^(-1/2) * weight; arguments and errors as in `add_rms_norm`."""
    return _launch(None, x, weight, eps, dependent)


def _launch(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dependent: bool
) -> Tensor:
    require_matrix("residual", residual, None, None)
    rows, hidden = residual.shape
    require_shape("weight", weight, (hidden,))
    out = torch.empty_like(residual)
    if rows == 0:
        return out
    block = triton.next_power_of_2(hidden)
    _add_rms_norm_kernel[(rows,)](
        x,
        residual,
        weight,
        out,
        eps,
        HIDDEN=hidden,
        BLOCK=block,
        ADDS=x is not None,
        DEPENDENT=dependent,
        # One 16-byte load per thread and tensor, within the limits of a block.
        **launch_options(min(max(block // 256, 1), 16), 1, dependent),
    )
    return out


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(normalised sum, new residual), both float64; the norm sees the unrounded sum."""
    total = x.double() + residual.double()
    scale = torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    return total * scale * weight.double(), total
