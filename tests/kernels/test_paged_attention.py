"""Paged decode and prefill attention against float64, over shuffled blocks and NaN padding."""

import numpy as np
import pytest
import torch

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.checks import KernelInputError
from nanovllm_core.kernels.launch import (
    PAGED_DECODE,
    PAGED_DECODE_ON,
    DecodeConfig,
    PrefillConfig,
    choose_decode,
)
from nanovllm_core.kernels.paged_decode import (
    paged_attention_reference,
    paged_decode_attention,
    paged_decode_workspace_size,
)
from nanovllm_core.kernels.paged_prefill import (
    list_tiles,
    paged_prefill_attention,
    tokens_per_tile,
)
from nanovllm_core.kernels.workspace import Workspace
from tests.kernels.support import DTYPES, assert_close, filled_cache

# (query heads, KV heads, head_dim): Qwen3-0.6B's group of 2, SmolLM2's of 3, none, a padded dim.
HEADS = [(4, 2, 128), (9, 3, 64), (2, 2, 32), (5, 1, 48)]


def decode_config(block_kv, max_splits):
    return DecodeConfig(
        block_kv=block_kv, num_warps=4, num_stages=2, target_blocks=1 << 20, max_splits=max_splits
    )


def run_decode(query, cache, context_lens, config, device):
    key, value, tables = cache
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    num_heads, head_dim = query.shape[1:]
    workspace = Workspace.allocate(
        *paged_decode_workspace_size(len(lens), num_heads, key.shape[2], head_dim, config), device
    )
    workspace.partials.fill_(float("nan"))
    out = torch.full_like(query, float("nan"))
    paged_decode_attention(
        query, key, value, tables, lens, head_dim**-0.5, workspace, out=out, config=config
    )
    assert not workspace.counters.any()
    starts = torch.arange(len(lens) + 1)
    return out, paged_attention_reference(query, key, value, tables, starts, lens, head_dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize(
    ("block_size", "block_kv", "max_splits"), [(16, 32, 1), (16, 16, 4), (64, 32, 4)]
)
def test_decode_matches_softmax_over_the_cache(
    num_heads, num_kv_heads, head_dim, block_size, block_kv, max_splits, dtype, device
):
    context_lens = [1, 33, 128]
    cache = filled_cache(context_lens, block_size, num_kv_heads, head_dim, dtype, device)
    query = (2 * torch.randn(len(context_lens), num_heads, head_dim)).to(device, dtype)
    config = decode_config(block_kv, max_splits)
    out, expected = run_decode(query, cache, context_lens, config, device)
    assert_close(out, expected)


@pytest.mark.parametrize("max_splits", [1, 4])
def test_decode_of_an_empty_sequence_is_zero(max_splits, device):
    context_lens = [0, 20, 0]
    cache = filled_cache(context_lens, 16, 2, 32, torch.float32, device)
    query = torch.randn(3, 4, 32, device=device)
    out, expected = run_decode(query, cache, context_lens, decode_config(16, max_splits), device)
    assert_close(out, expected)
    assert out[0].abs().max() == 0
    assert out[2].abs().max() == 0


def test_decode_without_a_workspace_is_refused_where_it_splits(device):
    key, value, tables = filled_cache([16], 16, 1, 32, torch.float32, device)
    query = torch.randn(1, 1, 32, device=device)
    lens = torch.tensor([16], dtype=torch.int32, device=device)
    with pytest.raises(KernelInputError, match="splits 1 sequences 4 ways"):
        paged_decode_attention(query, key, value, tables, lens, 1.0, config=decode_config(16, 4))


def test_number_of_splits_follows_the_batch_and_not_the_context():
    config = DecodeConfig(64, num_warps=4, num_stages=3, target_blocks=512, max_splits=32)
    assert config.num_splits(1, 8) == 32
    assert config.num_splits(16, 8) == 4
    assert config.num_splits(256, 8) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
@pytest.mark.parametrize(
    ("block_size", "block_m", "block_kv"), [(16, 16, 32), (64, 32, 16), (16, 64, 64)]
)
def test_prefill_matches_causal_softmax_over_the_cache(
    num_heads, num_kv_heads, head_dim, block_size, block_m, block_kv, dtype, device
):
    # A whole prompt, a later chunk, a lone token, a sequence without query tokens, an odd chunk.
    query_lens = [40, 17, 1, 0, 21]
    context_lens = [40, 60, 35, 0, 22]
    key, value, tables = filled_cache(
        context_lens, block_size, num_kv_heads, head_dim, dtype, device
    )
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(device, torch.int32)
    lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    query = (2 * torch.randn(sum(query_lens), num_heads, head_dim)).to(device, dtype)
    out = torch.full_like(query, float("nan"))
    config = PrefillConfig(block_m, block_kv, num_warps=4, num_stages=2)
    per_tile = tokens_per_tile(num_heads, num_kv_heads, config)
    tiles = np.concatenate([list_tiles(query_lens, context_lens, per_tile), [[-1, -1]]])
    paged_prefill_attention(
        query,
        key,
        value,
        tables,
        starts,
        lens,
        torch.from_numpy(tiles).to(device, torch.int32),
        head_dim**-0.5,
        out=out,
        config=config,
    )
    expected = paged_attention_reference(query, key, value, tables, starts, lens, head_dim**-0.5)
    assert_close(out, expected)


def test_tiles_cover_every_query_token_once_and_begin_with_those_that_see_most():
    tiles = list_tiles([40, 0, 17], [40, 5, 60], 16).tolist()
    assert sorted(tiles) == [[0, 0], [0, 16], [0, 32], [2, 0], [2, 16]]
    # Keys before each tile: 0, 16, 32 of the whole prompt, 43 and 59 of the later chunk.
    assert tiles == [[2, 16], [2, 0], [0, 32], [0, 16], [0, 0]]


def test_no_chunks_have_no_tiles():
    assert list_tiles([], [], 16).shape == (0, 2)


def test_more_query_heads_than_a_tile_has_rows_are_refused():
    config = PrefillConfig(16, 16, num_warps=4, num_stages=2)
    with pytest.raises(KernelInputError, match="got 17"):
        tokens_per_tile(17, 1, config)


@pytest.mark.parametrize("block_size", [8, 24])
def test_block_sizes_that_the_kernels_cannot_walk_are_refused(block_size, device):
    key = torch.zeros(2, block_size, 1, 32, device=device)
    tables = torch.zeros(1, 1, dtype=torch.int32, device=device)
    lens = torch.ones(1, dtype=torch.int32, device=device)
    query = torch.zeros(1, 1, 32, device=device)
    with pytest.raises(KernelInputError, match=f"power of two and at least 16, got {block_size}"):
        paged_decode_attention(query, key, key, tables, lens, 1.0, config=decode_config(16, 1))


def test_wide_heads_and_types_are_read_in_shorter_steps_with_fewer_warps():
    config = choose_decode(4)
    assert (config.block_kv, config.num_warps) == (256, 8)
    assert config.fitted(128, 2) == config
    assert (config.fitted(256, 2).block_kv, config.fitted(256, 2).num_warps) == (128, 4)
    assert (config.fitted(128, 4).block_kv, config.fitted(128, 4).num_warps) == (64, 2)


@pytest.mark.parametrize("table", [PAGED_DECODE, *PAGED_DECODE_ON.values()])
def test_every_table_has_an_entry_for_any_number_of_sequences_that_fits_wide_keys(table):
    limits = [limit for limit, _ in table]
    assert limits == sorted(set(limits))
    assert limits[-1] > 1 << 20
    assert all(each.fitted(128, 4).block_kv <= 64 for _, each in table)


def test_a_gpu_with_a_table_of_its_own_gets_its_entries(monkeypatch):
    monkeypatch.setattr(launch, "_gpu_name", lambda: "NVIDIA H200")
    assert launch.decode_table() is PAGED_DECODE_ON["H200"]
    assert choose_decode(8).block_kv == 256
    assert choose_decode(256).num_warps == 1
    monkeypatch.setattr(launch, "_gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    assert launch.decode_table() is PAGED_DECODE
    assert choose_decode(8).block_kv == 128
