"""Linear layer added to the residual stream, in one kernel.

    residual[r, n] += sum_k x[r, k] * W[n, k]

for the output projection of attention and the down projection. Every output element has one owner
and every sum one fixed order: no float atomics, the same result on every run.

Bytes moved: 2 N K for the weight, 2 rows K for x, 4 rows N for the residual in bf16. Qwen3-0.6B at
one row: O (K = 2048, N = 1024) 4.2 MB, 1.4 us; down (K = 3072, N = 1024) 6.3 MB, 2.1 us at
3.06 TB/s.

N is small. One row gives each block few whole weight rows (1024 rows are 256 blocks of 4) in
registers. Up to 16 rows a block holds 16 whole weight rows for the tensor cores, loaded before it
waits for x. With more rows the kernel splits K: split_k blocks store partial tiles, and the last to
arrive adds them to the residual in the order of their index.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.checks import KernelInputError, require_dtype, require_matrix
from nanovllm_core.kernels.device import (
    arrived_last,
    fence_weight_loads,
    launch_next,
    start_dependents,
    wait_for_previous,
)
from nanovllm_core.kernels.launch import GemvConfig, LinearConfig, ResidentConfig, TileConfig
from nanovllm_core.kernels.linear_tiles import (
    load_activation_row,
    load_resident_weights,
    load_tile,
    load_weight_rows,
    multiply_resident,
    multiply_rows,
    tile_position,
)
from nanovllm_core.kernels.workspace import Workspace


@triton.jit
def _gemv_kernel(
    x_ptr,
    w_ptr,
    residual_ptr,
    n_size,
    K: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < n_size
    w = load_weight_rows(w_ptr, columns, n_size, 0, K, K_MAIN)
    if K_REST > 0:
        w_rest = load_weight_rows(w_ptr, columns, n_size, K_MAIN, K, K_REST)
    launch_next(DEPENDENT)
    fence_weight_loads(DEPENDENT)
    for row in tl.static_range(ROWS):
        target = residual_ptr + row * n_size + columns
        y = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        y += multiply_rows(w, load_activation_row(x_ptr, row, 0, K, K_MAIN))
        if K_REST > 0:
            y += multiply_rows(w_rest, load_activation_row(x_ptr, row, K_MAIN, K, K_REST))
        tl.store(target, y.to(residual_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _resident_kernel(
    x_ptr,
    w_ptr,
    residual_ptr,
    n_size,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_K_REST: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    launch_next(DEPENDENT)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, ROWS_PADDED)
    w, w_rest = load_resident_weights(w_ptr, columns, n_size, K, GROUPS, GROUP_K, GROUP_K_REST)
    wait_for_previous(DEPENDENT)
    target = residual_ptr + rows[None, :] * n_size + columns[:, None]
    mask = (rows < ROWS)[None, :] & (columns < n_size)[:, None]
    y = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    product, _ = multiply_resident(w, w_rest, x_ptr, rows, ROWS, K, GROUPS, GROUP_K, GROUP_K_REST)
    y += product
    tl.store(target, y.to(residual_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile_kernel(
    x_ptr,
    w_ptr,
    residual_ptr,
    partials_ptr,
    counters_ptr,
    rows,
    n_size,
    K: tl.constexpr,
    K_PER_SPLIT: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_dependents(DEPENDENT)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    pid_m, pid_n = tile_position(tile, rows, n_size, BLOCK_M, BLOCK_N, GROUP_M)
    local_m = tl.arange(0, BLOCK_M)
    local_n = tl.arange(0, BLOCK_N)
    offs_m = pid_m * BLOCK_M + local_m
    offs_n = pid_n * BLOCK_N + local_n
    offs_k = split * K_PER_SPLIT + tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K_PER_SPLIT, BLOCK_K):
        # K_PER_SPLIT is a multiple of BLOCK_K; only the last split can reach past K.
        x = load_tile(x_ptr, offs_m, rows, start + offs_k, K, K != K_PER_SPLIT * SPLIT_K)
        w = load_tile(w_ptr, offs_n, n_size, start + offs_k, K, K != K_PER_SPLIT * SPLIT_K)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")

    finish = True
    if SPLIT_K > 1:
        local = local_m[:, None] * BLOCK_N + local_n[None, :]
        tile_ptr = partials_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N) + local
        tl.store(tile_ptr + split * (BLOCK_M * BLOCK_N), acc)
        finish = arrived_last(counters_ptr + tile, SPLIT_K)
        if finish:
            acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for other in tl.static_range(SPLIT_K):
                acc += tl.load(tile_ptr + other * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
    if finish:
        target = residual_ptr + offs_m.to(tl.int64)[:, None] * n_size + offs_n[None, :]
        mask = (offs_m < rows)[:, None] & (offs_n < n_size)[None, :]
        y = acc + tl.load(target, mask=mask, other=0.0).to(tl.float32)
        tl.store(target, y.to(residual_ptr.dtype.element_ty), mask=mask)


def linear_residual_workspace_size(rows: int, n_size: int) -> tuple[int, int]:
    """(values, counters) that `linear_residual` needs at most in a workspace with its own table."""
    # Which entry is taken depends on K and the type as well; only tiles need any workspace.
    tiled = next(
        config
        for max_rows, config in launch.LINEAR_RESIDUAL
        if rows <= max_rows and isinstance(config, TileConfig)
    )
    return _workspace_size(rows, n_size, tiled)


def _workspace_size(rows: int, n_size: int, config: LinearConfig) -> tuple[int, int]:
    if not isinstance(config, TileConfig) or config.split_k == 1:
        return 0, 0
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(n_size, config.block_n)
    return tiles * config.split_k * config.block_m * config.block_n, tiles


def linear_residual(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    workspace: Workspace | None = None,
    *,
    config: LinearConfig | None = None,
    dependent: bool = False,
) -> None:
    """residual += x @ weight^T, in place.

    Args:
        x: [rows, K] float16, bfloat16 or float32.
        weight: [N, K] of x's dtype.
        residual: [rows, N], updated in place; must not overlap x.
        workspace: needed where the launch splits K, see `linear_residual_workspace_size`.
        config: launch configuration; None takes `launch.LINEAR_RESIDUAL`'s.
        dependent: programmatic dependent launch, see `rms_norm_linear`.

    Raises:
        KernelInputError: a shape, dtype or layout does not fit, or the workspace is missing or too
            small.
    """
    require_matrix("x", x, None, None)
    rows, k_size = x.shape
    require_matrix("weight", weight, None, k_size)
    require_dtype("weight", weight, x.dtype)
    n_size = weight.shape[0]
    require_matrix("residual", residual, rows, n_size)
    if rows == 0:
        return
    if config is None:
        config = launch.choose(launch.LINEAR_RESIDUAL, rows, k_size, x.element_size())
    if isinstance(config, GemvConfig):
        k_main, k_rest = launch.cut_in_powers(k_size)
        block_n = config.fitted_block_n(k_main + k_rest)
        _gemv_kernel[(triton.cdiv(n_size, block_n),)](
            x,
            weight,
            residual,
            n_size,
            K=k_size,
            K_MAIN=k_main,
            K_REST=k_rest,
            ROWS=rows,
            BLOCK_N=block_n,
            DEPENDENT=dependent,
            **config.options(dependent),
        )
        return
    if isinstance(config, ResidentConfig):
        _resident_kernel[(triton.cdiv(n_size, config.BLOCK_N),)](
            x,
            weight,
            residual,
            n_size,
            DEPENDENT=dependent,
            **config.shape(rows, k_size),
            **config.options(dependent),
        )
        return
    num_values, num_counters = _workspace_size(rows, n_size, config)
    if num_values:
        if workspace is None:
            raise KernelInputError(
                f"linear_residual splits K {config.split_k} ways at {rows} rows and needs a "
                f"workspace of {num_values} values and {num_counters} counters"
            )
        workspace.require("linear_residual", num_values, num_counters)
    block_k = config.block_k
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(n_size, config.block_n)
    _tile_kernel[(tiles, config.split_k)](
        x,
        weight,
        residual,
        workspace.partials if workspace is not None else None,
        workspace.counters if workspace is not None else None,
        rows,
        n_size,
        K=k_size,
        K_PER_SPLIT=triton.cdiv(triton.cdiv(k_size, config.split_k), block_k) * block_k,
        SPLIT_K=config.split_k,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        DEPENDENT=dependent,
        **config.options(dependent),
    )


def linear_residual_reference(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """The new residual: [rows, N] float64."""
    return residual.double() + x.double() @ weight.double().T
