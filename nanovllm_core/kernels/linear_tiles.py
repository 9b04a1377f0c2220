"""Device functions of the fused linear kernels: how x and the weight are walked.

Weights are [N, K] row-major, as checkpoints store them, so both operands are read along K.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def load_weight_rows(
    w_ptr, rows, row_limit, START: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr
):
    """Columns START and up of weight rows of K: [len(rows), WIDTH], zero outside.

    Weights are used once per step and pass through the L2 cache first-out, so that activations and
    the small tensors stay in it.
    """
    columns = START + tl.arange(0, WIDTH)
    return tl.load(
        w_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :],
        mask=(rows < row_limit)[:, None] & (columns < K)[None, :],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit
def load_activation_row(x_ptr, row, START: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """Columns START and up of a row of x, as float32 [WIDTH], zero past K."""
    columns = START + tl.arange(0, WIDTH)
    return tl.load(x_ptr + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)


@triton.jit
def inverse_rms(x, eps, K: tl.constexpr):
    """rsqrt(mean(x^2) + eps) of a float32 row."""
    return tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)


@triton.jit
def multiply_rows(w, x):
    """w @ x in float32: w [n, k] of any float type, x [k] float32; products are exact in bf16."""
    return tl.sum(w.to(tl.float32) * x[None, :], axis=1)


@triton.jit
def load_resident_weights(
    w_ptr,
    rows,
    row_limit,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_K_REST: tl.constexpr,
):
    """Whole weight rows in groups of K, zero outside: two [GROUPS, len(rows), columns].

    The first has GROUP_K columns a group, the second GROUP_K_REST of what is left of K. Where
    nothing is left, the second is the first.
    """
    at = w_ptr + rows.to(tl.int64)[None, :, None] * K
    inside = (rows < row_limit)[None, :, None]
    w = _load_groups(at, inside, 0, K, GROUPS, GROUP_K, 1, "evict_first")
    rest = w
    if GROUP_K_REST > 0:
        rest = _load_groups(at, inside, GROUPS * GROUP_K, K, GROUPS, GROUP_K_REST, 1, "evict_first")
    return w, rest


@triton.jit
def multiply_resident(
    w,
    w_rest,
    x_ptr,
    rows,
    row_limit,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_K: tl.constexpr,
    GROUP_K_REST: tl.constexpr,
):
    """The weights of `load_resident_weights` @ x^T for rows of x, on tensor cores in float32.

    Returns:
        [weight rows, len(rows)], and the sum of squares of each row of x, [len(rows)].
    """
    at = x_ptr + rows[None, None, :] * K
    inside = (rows < row_limit)[None, None, :]
    x = _load_groups(at, inside, 0, K, GROUPS, GROUP_K, 2, "")
    products = tl.dot(w, x, input_precision="ieee")
    squares = _squares_of_groups(x)
    if GROUP_K_REST > 0:
        x_rest = _load_groups(at, inside, GROUPS * GROUP_K, K, GROUPS, GROUP_K_REST, 2, "")
        products += tl.dot(w_rest, x_rest, input_precision="ieee")
        squares += _squares_of_groups(x_rest)
    return tl.sum(products, axis=0), squares


@triton.jit
def _load_groups(
    row_ptrs,
    inside,
    START: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_K: tl.constexpr,
    ROW_AXIS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Columns START and up of rows of K, in groups; rows lie along axis 1 or 2."""
    columns = START + tl.arange(0, GROUPS)[:, None] * GROUP_K + tl.arange(0, GROUP_K)[None, :]
    columns = tl.expand_dims(columns, ROW_AXIS)
    mask = inside & (columns < K)
    return tl.load(row_ptrs + columns, mask=mask, other=0.0, eviction_policy=EVICTION)


@triton.jit
def _squares_of_groups(x):
    wide = x.to(tl.float32)
    return tl.sum(tl.sum(wide * wide, axis=1), axis=0)


@triton.jit
def squares_of_rows(
    x_ptr, rows, row_limit, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Sum of squares of each row of x, float32 [BLOCK_M], by a pass of its own over x.

    From 64 rows a tile's product runs on wgmma, asynchronously out of shared memory. Reading the
    same tile into registers beside it, to square it, gave wrong sums that changed from run to run
    (Triton 3.6, sm_90); x comes from the L2 cache the second time.
    """
    squares = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, rows, row_limit, columns, K, K % BLOCK_K != 0).to(tl.float32)
        squares += tl.sum(x * x, axis=1)
    return squares


@triton.jit
def tile_position(
    pid,
    rows,
    n_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Row tile and column tile of a program, GROUP_M row tiles deep before the next column."""
    num_m = tl.cdiv(rows, BLOCK_M)
    num_n = tl.cdiv(n_size, BLOCK_N)
    group = pid // (GROUP_M * num_n)
    group_rows = min(num_m - group * GROUP_M, GROUP_M)
    pid_m = group * GROUP_M + (pid % (GROUP_M * num_n)) % group_rows
    pid_n = (pid % (GROUP_M * num_n)) // group_rows
    return pid_m, pid_n


@triton.jit
def load_tile(ptr, rows, row_limit, columns, K: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """[len(rows), len(columns)] of a row-major matrix of K columns, zero outside."""
    mask = (rows < row_limit)[:, None]
    if MASK_COLUMNS:
        mask = mask & (columns < K)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * K + columns[None, :], mask=mask, other=0.0)
