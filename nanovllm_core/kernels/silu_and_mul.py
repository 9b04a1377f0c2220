"""SiLU(gate) * up over the output of a fused gate-up projection, for sizes where cuBLAS multiplies.

    out[r, i] = silu(s[r] * gate_up[r, i]) * s[r] * gate_up[r, I + i]

s is 1, or the scale of an RMSNorm in front of the projection that the projection left out, since
it is the same for a whole row:

    s[r] = (mean_k hidden[r, k]^2 + eps)^(-1/2)

Bytes moved in bf16: 4 I read and 2 I written per row, and hidden once for each block of a row.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels.checks import (
    KernelInputError,
    require_matrix,
    require_unscaled_input,
)
from nanovllm_core.kernels.device import silu
from nanovllm_core.kernels.linear_tiles import inverse_rms, load_activation_row

# 8 bf16 values (one 16-byte load) for each of 128 threads.
_BLOCK = 1024


@triton.jit
def _silu_and_mul_kernel(
    gate_up_ptr,
    hidden_ptr,
    out_ptr,
    eps,
    INTERMEDIATE: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < INTERMEDIATE
    base = gate_up_ptr + row * 2 * INTERMEDIATE
    gate = tl.load(base + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(base + INTERMEDIATE + columns, mask=inside, other=0.0).to(tl.float32)
    if HIDDEN > 0:
        scale = inverse_rms(
            load_activation_row(hidden_ptr, row, 0, HIDDEN, HIDDEN_PADDED), eps, HIDDEN
        )
        gate *= scale
        up *= scale
    y = (silu(gate) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * INTERMEDIATE + columns, y, mask=inside)


def silu_and_mul(gate_up: Tensor, hidden: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """silu(gate) * up.

    Args:
        gate_up: [rows, 2 * I], gate values first.
        hidden: [rows, hidden_size] of gate_up's dtype, what the projection was given in place of
            its RMSNorm with the norm's weight folded in (`rms_norm_linear.fold_norm_weight`); None
            if gate_up is complete.
        eps: the norm's epsilon.

    Returns:
        [rows, I] of gate_up's dtype.

    Raises:
        KernelInputError: gate_up is not a contiguous matrix with an even number of columns, or
            hidden does not fit it.
    """
    require_matrix("gate_up", gate_up, None, None)
    rows, doubled = gate_up.shape
    hidden_size = require_unscaled_input(hidden, gate_up)
    if doubled % 2:
        raise KernelInputError(f"gate_up must have an even number of columns, got {doubled}")
    intermediate = doubled // 2
    out = torch.empty(rows, intermediate, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_and_mul_kernel[(rows, triton.cdiv(intermediate, _BLOCK))](
            gate_up,
            hidden,
            out,
            eps,
            INTERMEDIATE=intermediate,
            BLOCK=_BLOCK,
            HIDDEN=hidden_size,
            HIDDEN_PADDED=triton.next_power_of_2(hidden_size),
            num_warps=4,
        )
    return out


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """[rows, I] float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
