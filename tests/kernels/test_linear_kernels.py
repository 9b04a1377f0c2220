"""The fused linear kernels against float64, at sizes that divide nothing evenly."""

import pytest
import torch

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.checks import KernelInputError
from nanovllm_core.kernels.launch import (
    RMS_NORM_LINEAR,
    GemvConfig,
    ResidentConfig,
    TileConfig,
    choose,
)
from nanovllm_core.kernels.linear_residual import (
    linear_residual,
    linear_residual_reference,
    linear_residual_workspace_size,
)
from nanovllm_core.kernels.rms_norm_linear import (
    fold_norm_weight,
    rms_norm_linear,
    rms_norm_linear_reference,
)
from nanovllm_core.kernels.silu_mul_linear import silu_mul_linear, silu_mul_linear_reference
from nanovllm_core.kernels.workspace import Workspace
from tests.kernels.support import DTYPES, assert_close, poisoned

EPS = 1e-6
SMALL_TILES = TileConfig(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=3)
TALL_TILES = TileConfig(block_m=32, block_n=32, block_k=64, num_warps=4, num_stages=2, group_m=2)
# (rows, K, N, launch): one row, several, one tile, several tiles with ragged edges, the tables'.
SHAPES = [
    pytest.param(1, 128, 40, None, id="one-row"),
    pytest.param(3, 96, 37, GemvConfig(block_n=4, num_warps=4), id="few-rows-ragged"),
    pytest.param(3, 128, 37, ResidentConfig(groups=4, num_warps=4), id="resident-ragged"),
    pytest.param(11, 96, 48, ResidentConfig(groups=2, num_warps=4), id="resident-many-rows"),
    pytest.param(9, 96, 37, SMALL_TILES, id="tile-ragged"),
    pytest.param(70, 80, 50, TALL_TILES, id="many-tiles-ragged"),
    pytest.param(20, 128, 64, None, id="table-tile"),
]


def random_operands(rows, k_size, n_size, dtype, device):
    x = (3 * torch.randn(rows, k_size)).to(device, dtype)
    weight = (torch.randn(n_size, k_size) / k_size**0.5).to(device, dtype)
    norm_weight = (1 + 0.3 * torch.randn(k_size)).to(device, dtype)
    return x, weight, norm_weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k_size", "n_size", "config"), SHAPES)
def test_rms_norm_linear_matches_norm_then_product(rows, k_size, n_size, config, dtype, device):
    x, weight, norm_weight = random_operands(rows, k_size, n_size, dtype, device)
    bias = torch.randn(n_size).to(device, dtype)
    folded = fold_norm_weight(weight, norm_weight)
    out = poisoned(rows, n_size, dtype=dtype, device=device)
    rms_norm_linear(x, folded, EPS, bias=bias, out=out, config=config)
    assert_close(out, rms_norm_linear_reference(x, weight, norm_weight, EPS, bias))


def test_rms_norm_linear_honours_eps_on_small_rows(device):
    x = torch.full((2, 64), 1e-3, device=device)
    weight = torch.randn(16, 64, device=device)
    ones = torch.ones(64, device=device)
    for config in (None, SMALL_TILES):
        out = rms_norm_linear(x, weight, 1e-2, config=config)
        assert_close(out, rms_norm_linear_reference(x, weight, ones, 1e-2))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k_size", "n_size", "config"), SHAPES)
def test_silu_mul_linear_matches_its_parts(rows, k_size, n_size, config, normed, dtype, device):
    x, weight, norm_weight = random_operands(rows, k_size, 2 * n_size, dtype, device)
    out = poisoned(rows, n_size, dtype=dtype, device=device)
    if normed:
        folded = fold_norm_weight(weight, norm_weight)
        silu_mul_linear(x, folded, eps=EPS, out=out, config=config)
        assert_close(out, silu_mul_linear_reference(x, weight, norm_weight, EPS))
    else:
        silu_mul_linear(x, weight, out=out, config=config)
        assert_close(out, silu_mul_linear_reference(x, weight))


RESIDUAL_SHAPES = [
    *SHAPES,
    pytest.param(
        33, 200, 37, TileConfig(16, 16, 32, num_warps=4, num_stages=3, split_k=4), id="split-k"
    ),
    pytest.param(
        5, 64, 20, TileConfig(16, 32, 32, num_warps=4, num_stages=3, split_k=8), id="empty-splits"
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k_size", "n_size", "config"), RESIDUAL_SHAPES)
def test_linear_residual_adds_the_product(rows, k_size, n_size, config, dtype, device):
    x, weight, _ = random_operands(rows, k_size, n_size, dtype, device)
    residual = torch.randn(rows, n_size).to(device, dtype)
    expected = linear_residual_reference(x, weight, residual)
    workspace = Workspace.allocate(1 << 16, 1 << 10, device)
    linear_residual(x, weight, residual, workspace, config=config)
    assert_close(residual, expected)


def test_split_k_leaves_the_workspace_ready_and_repeats_exactly(device):
    config = TileConfig(16, 16, 32, num_warps=4, num_stages=3, split_k=4)
    x, weight, _ = random_operands(20, 256, 48, torch.float32, device)
    workspace = Workspace.allocate(1 << 14, 64, device)
    results = []
    for _ in range(3):
        residual = torch.zeros(20, 48, device=device)
        linear_residual(x, weight, residual, workspace, config=config)
        results.append(residual)
    assert not workspace.counters.any()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_split_k_without_a_workspace_is_refused(device):
    x, weight, _ = random_operands(20, 64, 32, torch.float32, device)
    residual = torch.zeros(20, 32, device=device)
    values, counters = linear_residual_workspace_size(20, 32)
    assert values > 0
    with pytest.raises(KernelInputError, match=f"{values} values and {counters} counters"):
        linear_residual(x, weight, residual)
    with pytest.raises(KernelInputError, match="largest launch"):
        linear_residual(x, weight, residual, Workspace.allocate(values - 1, counters, device))


def test_no_rows_give_an_empty_result(device):
    weight = torch.randn(16, 32, device=device)
    x = torch.empty(0, 32, device=device)
    assert rms_norm_linear(x, weight, EPS).shape == (0, 16)
    assert silu_mul_linear(x, weight).shape == (0, 8)
    linear_residual(x, weight, torch.empty(0, 16, device=device))


def test_misshapen_operands_are_refused(device):
    x, weight, _ = random_operands(2, 32, 16, torch.float32, device)
    with pytest.raises(KernelInputError, match="folded_weight must have shape"):
        rms_norm_linear(x, weight[:, :16].contiguous(), EPS)
    with pytest.raises(KernelInputError, match="weight must be contiguous"):
        silu_mul_linear(x, torch.randn(32, 16, device=device).T)
    with pytest.raises(KernelInputError, match="even number of rows"):
        silu_mul_linear(x, weight[:15].contiguous())
    with pytest.raises(KernelInputError, match="norm_weight must have shape"):
        fold_norm_weight(weight, torch.ones(16, device=device))


def test_large_rows_of_weight_still_fit_registers():
    config = GemvConfig(block_n=16, num_warps=4)
    assert config.fitted_block_n(1024) == 16
    assert config.fitted_block_n(4096) == 4
    assert config.fitted_block_n(1 << 20) == 1


def test_weights_are_only_held_where_they_fit_and_tensor_cores_take_them():
    assert isinstance(choose(RMS_NORM_LINEAR, 1, 1024, 2), ResidentConfig)
    assert isinstance(choose(RMS_NORM_LINEAR, 1, 4096, 2), GemvConfig)
    assert isinstance(choose(RMS_NORM_LINEAR, 1, 1024, 4), GemvConfig)
    assert isinstance(choose(RMS_NORM_LINEAR, 8, 1024, 2), ResidentConfig)
    assert isinstance(choose(RMS_NORM_LINEAR, 8, 1024, 4), TileConfig)
    assert isinstance(choose(RMS_NORM_LINEAR, 16, 8192, 2), TileConfig)
    assert isinstance(choose(RMS_NORM_LINEAR, 8, 32, 2), TileConfig)
    assert isinstance(choose(RMS_NORM_LINEAR, 17, 1024, 2), TileConfig)


def test_a_gpu_with_little_shared_memory_takes_tiles(monkeypatch):
    monkeypatch.setattr(launch, "_max_resident_bytes", lambda: 99 * 1024)
    assert isinstance(choose(RMS_NORM_LINEAR, 8, 1024, 2), ResidentConfig)
    assert isinstance(choose(RMS_NORM_LINEAR, 16, 2048, 2), TileConfig)


def test_long_weight_rows_are_spread_over_more_warps():
    assert choose(RMS_NORM_LINEAR, 8, 2048, 2).num_warps == 4
    assert choose(RMS_NORM_LINEAR, 8, 4096, 2).num_warps == 16


def test_more_rows_than_a_block_can_hold_beside_its_weights_are_refused(device):
    x, weight, _ = random_operands(17, 128, 32, torch.float32, device)
    with pytest.raises(KernelInputError, match="up to 16 rows, got 17"):
        rms_norm_linear(x, weight, EPS, config=ResidentConfig(groups=4, num_warps=4))
