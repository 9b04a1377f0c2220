"""Decode attention from the QKV projection against the two kernels that it replaces."""

import pytest
import torch

from nanovllm_core.kernels.launch import DecodeConfig
from nanovllm_core.kernels.paged_decode import (
    paged_attention_reference,
    paged_decode_workspace_size,
)
from nanovllm_core.kernels.qk_norm_rope_cache import qk_norm_rope_cache
from nanovllm_core.kernels.qkv_decode import qkv_decode_attention
from nanovllm_core.kernels.workspace import Workspace
from tests.kernels.support import DTYPES, assert_close

PAGE, KV_HEADS, GROUP = 16, 2, 2
HEADS = KV_HEADS * GROUP
CONFIGS = [
    DecodeConfig(16, 1, 2, target_blocks=1, max_splits=1),
    DecodeConfig(16, 1, 2, target_blocks=64, max_splits=4),
    DecodeConfig(16, 1, 2, target_blocks=64, max_splits=4, early_tile=True),
    DecodeConfig(32, 1, 2, target_blocks=1, max_splits=1, early_tile=True),
]


@pytest.mark.parametrize("config_index", range(4), ids=["whole", "split", "early-split", "early"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_rotation_then_attention(dtype, config_index, device):
    config = CONFIGS[config_index]
    # Each value meets each value of every other choice, without a kernel to compile for every
    # combination: the columns of an orthogonal array.
    half, odd = divmod(config_index, 2)
    wide = dtype is not torch.float32
    head_dim = 48 if (half + wide) % 2 else 32
    normed = (odd + wide) % 2 == 0
    unscaled = (half + odd + wide) % 2 == 1

    lens = [1, 16, 37, 0, 48]
    num_seqs = len(lens)
    tables = torch.randperm(4 * num_seqs, device=device).to(torch.int32).view(num_seqs, 4)
    context_lens = torch.tensor(lens, dtype=torch.int32, device=device)
    positions = (context_lens.long() - 1).clamp(min=0)
    slots = tables.gather(1, (positions // PAGE)[:, None])[:, 0].long() * PAGE + positions % PAGE
    shape = (4 * num_seqs, PAGE, KV_HEADS, head_dim)
    key, value = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    expected_key, expected_value = key.clone(), value.clone()
    qkv = torch.randn(num_seqs, (HEADS + 2 * KV_HEADS) * head_dim, device=device).to(dtype)
    hidden = 5 * torch.randn(num_seqs, 40, device=device).to(dtype) if unscaled else None
    weights = [torch.rand(head_dim, device=device).to(dtype) + 0.5 for _ in range(2)]
    q_weight, k_weight = weights if normed else (None, None)
    angles = torch.rand(64, head_dim // 2, device=device)
    rotation = (angles.cos().contiguous(), angles.sin().contiguous())

    size = paged_decode_workspace_size(num_seqs, HEADS, KV_HEADS, head_dim, config)
    out = qkv_decode_attention(
        qkv,
        q_weight,
        k_weight,
        1e-6,
        *rotation,
        positions,
        slots,
        key,
        value,
        tables,
        context_lens,
        HEADS,
        head_dim**-0.5,
        Workspace.allocate(*size, device),
        hidden=hidden,
        config=config,
    )

    live = context_lens > 0
    query = torch.zeros(num_seqs, HEADS, head_dim, dtype=dtype, device=device)
    query[live] = qk_norm_rope_cache(
        qkv[live],
        q_weight,
        k_weight,
        1e-6,
        *rotation,
        positions[live],
        slots[live],
        expected_key,
        expected_value,
        HEADS,
        hidden=hidden[live] if unscaled else None,
    )
    reference = paged_attention_reference(
        query,
        expected_key,
        expected_value,
        tables,
        torch.arange(num_seqs + 1),
        context_lens,
        head_dim**-0.5,
    )
    assert_close(out, reference)
    assert (out[~live] == 0).all()
    assert_close(key, expected_key.double())
    assert torch.equal(value, expected_value)
