"""Comparison with float64 references, and random inputs that no index error can hide in."""

import pytest
import torch
from torch import Tensor

# The float types a test runs in: what the interpreter computes rightly, and bfloat16 on a GPU.
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.float16, id="float16"),
    pytest.param(
        torch.bfloat16,
        id="bfloat16",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available(),
                reason="bfloat16 needs a GPU: Triton's interpreter computes it wrongly",
            ),
        ],
    ),
]

# Relative error in the Frobenius norm: a few roundings of the storage type.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(out: Tensor, reference: Tensor) -> float:
    return ((out.double() - reference).norm() / reference.norm()).item()


def assert_close(out: Tensor, reference: Tensor) -> None:
    """Within a few roundings of the storage type, as a whole and in the worst element."""
    tolerance = _TOLERANCE[out.dtype]
    assert out.isfinite().all()
    assert relative_error(out, reference) < tolerance
    worst = (out.double() - reference).abs().max()
    assert worst < 20 * tolerance * reference.square().mean().sqrt()


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of NaN: what a kernel leaves unwritten shows."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def paged_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Key and value cache of one layer, NaN throughout."""
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    return (
        poisoned(*shape, dtype=dtype, device=device),
        poisoned(*shape, dtype=dtype, device=device),
    )


def filled_cache(
    context_lens: list[int],
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Caches with random tokens in shuffled blocks, and the block tables.

    Slots past a context hold NaN, and table entries past it a block that does not exist.
    """
    needed = [-(-length // block_size) for length in context_lens]
    num_blocks = sum(needed) + 1
    key, value = paged_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype, device)
    shuffled = torch.randperm(num_blocks).tolist()
    tables = torch.full((len(context_lens), max(needed) + 1), 1 << 30, dtype=torch.int32)
    for seq, length in enumerate(context_lens):
        for index in range(needed[seq]):
            block = shuffled.pop()
            tables[seq, index] = block
            filled = min(block_size, length - index * block_size)
            for cache in (key, value):
                cache[block, :filled] = torch.randn(filled, num_kv_heads, head_dim).to(cache)
    return key, value, tables.to(device)
