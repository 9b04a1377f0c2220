"""Residual add with norm, SiLU product, and QK norm with RoPE and cache write, against float64."""

import pytest
import torch

from nanovllm_core.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from nanovllm_core.kernels.checks import KernelInputError
from nanovllm_core.kernels.qk_norm_rope_cache import qk_norm_rope_cache, qk_norm_rope_reference
from nanovllm_core.kernels.silu_and_mul import silu_and_mul, silu_and_mul_reference
from tests.kernels.support import DTYPES, assert_close, paged_cache

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (5, 576), (3, 100)])
def test_add_rms_norm_matches_add_then_norm(rows, hidden, dtype, device):
    x = torch.randn(rows, hidden).to(device, dtype)
    residual = (4 * torch.randn(rows, hidden)).to(device, dtype)
    weight = (1 + 0.3 * torch.randn(hidden)).to(device, dtype)
    expected, total = add_rms_norm_reference(x, residual, weight, EPS)
    out = add_rms_norm(x, residual, weight, EPS)
    assert_close(out, expected)
    assert_close(residual, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "intermediate"), [(1, 1024), (3, 1500), (2, 7)])
def test_silu_and_mul_matches_its_definition(rows, intermediate, dtype, device):
    gate_up = (4 * torch.randn(rows, 2 * intermediate)).to(device, dtype)
    assert_close(silu_and_mul(gate_up), silu_and_mul_reference(gate_up))


def row_scales(hidden):
    """What an RMSNorm multiplies each row of hidden with: [rows, 1] float64."""
    return torch.rsqrt(hidden.double().square().mean(dim=-1, keepdim=True) + EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "intermediate", "size"), [(1, 1024, 64), (3, 1500, 100)])
def test_silu_and_mul_makes_up_for_a_norm_that_was_left_out(
    rows, intermediate, size, dtype, device
):
    hidden = (5 * torch.randn(rows, size)).to(device, dtype)
    gate_up = (20 * torch.randn(rows, 2 * intermediate)).to(device, dtype)
    expected = silu_and_mul_reference(gate_up.double() * row_scales(hidden))
    assert_close(silu_and_mul(gate_up, hidden, EPS), expected)


def test_hidden_states_of_another_batch_are_refused(device):
    gate_up = torch.zeros(2, 8, device=device)
    with pytest.raises(KernelInputError, match=r"hidden must have shape \[2, any\], got \[3, 4\]"):
        silu_and_mul(gate_up, torch.zeros(3, 4, device=device), EPS)
    with pytest.raises(KernelInputError, match=r"hidden must be torch\.float32"):
        silu_and_mul(gate_up, torch.zeros(2, 4, dtype=torch.float16, device=device), EPS)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_of_very_negative_gates_is_zero(device):
    gate_up = torch.tensor([[-200.0, -1000.0, 1.0, 1.0]], device=device)
    assert silu_and_mul(gate_up).abs().max() == 0


def test_silu_and_mul_refuses_an_odd_width(device):
    with pytest.raises(KernelInputError, match="even number of columns, got 5"):
        silu_and_mul(torch.zeros(2, 5, device=device))


def rope_tables(max_len, head_dim, device):
    angles = torch.arange(max_len)[:, None] * 10000.0 ** (
        -torch.arange(0, head_dim, 2)[None, :] / head_dim
    )
    return angles.cos().float().to(device), angles.sin().float().to(device)


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(16, 8, 128), (9, 3, 64), (2, 1, 48), (12, 12, 32)]
)
def test_qk_norm_rope_cache_writes_every_head_to_its_slot(
    num_heads, num_kv_heads, head_dim, dtype, normed, unscaled, device
):
    num_tokens, block_size, num_blocks = 5, 16, 4
    columns = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = (2 * torch.randn(num_tokens, columns)).to(device, dtype)
    weights = [
        (1 + 0.3 * torch.randn(head_dim)).to(device, dtype) if normed else None for _ in range(2)
    ]
    cos, sin = rope_tables(100, head_dim, device)
    positions = torch.randint(0, 100, (num_tokens,), device=device)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(device)
    key_cache, value_cache = paged_cache(
        num_blocks, block_size, num_kv_heads, head_dim, dtype, device
    )
    hidden = (5 * torch.randn(num_tokens, 100)).to(device, dtype) if unscaled else None
    query = qk_norm_rope_cache(
        qkv,
        *weights,
        EPS,
        cos,
        sin,
        positions,
        slots,
        key_cache,
        value_cache,
        num_heads,
        hidden=hidden,
    )
    complete = qkv.double() * row_scales(hidden) if unscaled else qkv
    q, k, v = complete.view(num_tokens, -1, head_dim).split(
        [num_heads, num_kv_heads, num_kv_heads], dim=1
    )
    keys = key_cache.flatten(0, 1)
    values = value_cache.flatten(0, 1)
    assert_close(query, qk_norm_rope_reference(q, weights[0], EPS, cos, sin, positions))
    assert_close(keys[slots], qk_norm_rope_reference(k, weights[1], EPS, cos, sin, positions))
    if unscaled:
        assert_close(values[slots], v)
    else:
        assert torch.equal(values[slots], v)
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool)
    untouched[slots.cpu()] = False
    assert keys[untouched].isnan().all()
    assert values[untouched].isnan().all()


def test_one_norm_weight_without_the_other_is_refused(device):
    cos, sin = rope_tables(4, 16, device)
    key_cache, value_cache = paged_cache(1, 16, 1, 16, torch.float32, device)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(KernelInputError, match="both q_norm_weight and k_norm_weight"):
        qk_norm_rope_cache(
            torch.zeros(1, 48, device=device),
            torch.ones(16, device=device),
            None,
            EPS,
            cos,
            sin,
            index,
            index,
            key_cache,
            value_cache,
            1,
        )
