"""What the kernels of `row_threshold` share: order of logits, a row's filters, brackets, sums."""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import triton
import triton.language as tl

# 38 blocks a row for Qwen3's vocabulary, of 256 threads with 16 logits each.
NUM_WARPS = 8
THREADS = tl.constexpr(32 * NUM_WARPS)
BLOCK = tl.constexpr(16 * THREADS.value)
EDGES = tl.constexpr(16)
# Values of a row's state, see `row_rounds.round_kernel`.
STATE_SIZE = tl.constexpr(8 + EDGES.value)
# Of a list: its length and the extremes of its keys.
RECORD_SIZE = tl.constexpr(3)

# A listed logit's mass is a multiple of 2^-40 of the largest logit's: int64 holds 2^22 of those.
MASS_UNITS = tl.constexpr(2.0**40)
INT32_MAX = tl.constexpr(2**31 - 1)
INT32_MIN = tl.constexpr(-(2**31))


@triton.jit
def ordered_key(x):
    """int32 that orders like float32 x: negative floats have their magnitude bits flipped."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def float_of_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def with_min_p(threshold, row_max, temperature, min_p):
    """The higher of threshold and the logit that has min_p of the largest probability."""
    applies = (min_p > 0.0) & (temperature > 0.0)
    bound = row_max + temperature * tl.log(tl.where(applies, min_p, 1.0))
    return tl.where(applies, tl.maximum(threshold, bound), threshold)


@triton.jit
def row_filters(temperature_ptr, top_k_ptr, top_p_ptr, row, vocab_size):
    """A row's temperature, top_k and top_p, and which of the two filters it has."""
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    has_top_k = (temperature > 0.0) & (top_k > 0) & (top_k < vocab_size)
    has_top_p = (temperature > 0.0) & (top_p < 1.0)
    return temperature, top_k, top_p, has_top_k, has_top_p


@triton.jit
def is_open(bracket):
    """Whether a bracket (low, high, ...) holds more than one bit pattern."""
    return ordered_key(bracket[1]) > ordered_key(bracket[0]) + 1


@triton.jit
def load_bracket(bracket_ptr):
    return tl.load(bracket_ptr), tl.load(bracket_ptr + 1), tl.load(bracket_ptr + 2)


@triton.jit
def max_of(maxima_ptr, num_blocks, BLOCKS: tl.constexpr):
    blocks = tl.arange(0, BLOCKS)
    return tl.max(tl.load(maxima_ptr + blocks, mask=blocks < num_blocks, other=float("-inf")))


@triton.jit
def sums_at_edges(
    values_ptr,
    extent,
    end,
    edges,
    row_max,
    temperature,
    DTYPE: tl.constexpr,
    NUM_EDGES: tl.constexpr,
):
    """How much of the first extent values, of which end exist, reaches each of NUM_EDGES edges.

    int32 counts them, float32 adds their masses relative to the largest logit's, int64 adds those
    in MASS_UNITS.
    """
    sums = tl.zeros([NUM_EDGES, THREADS], dtype=DTYPE)
    for start in tl.range(0, extent, THREADS, loop_unroll_factor=8):
        index = start + tl.arange(0, THREADS)
        values = tl.load(values_ptr + index, mask=index < end, other=float("-inf"))
        weights = tl.full([THREADS], 1, dtype=DTYPE)
        if tl.int32 != DTYPE:
            weights = tl.exp((values - row_max) / temperature)
        if tl.int64 == DTYPE:
            weights = (weights * MASS_UNITS).to(tl.int64)
        sums += tl.where(values[None, :] >= edges[:, None], weights[None, :], 0)
    return tl.sum(sums, axis=1)
