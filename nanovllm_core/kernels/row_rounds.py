"""The first passes of `row_threshold` over rows: extremes, and rounds that narrow brackets."""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import triton
import triton.language as tl

from nanovllm_core.kernels.device import arrived_last
from nanovllm_core.kernels.row_brackets import (
    BLOCK,
    EDGES,
    INT32_MAX,
    INT32_MIN,
    RECORD_SIZE,
    STATE_SIZE,
    float_of_key,
    is_open,
    load_bracket,
    max_of,
    ordered_key,
    row_filters,
    sums_at_edges,
)

# Logits farther apart than this are masked by a large negative number, not a model's. Edges then
# lie evenly between bit patterns, of which every power of two has as many.
_WIDE = tl.constexpr(1024.0)


@triton.jit
def extremes_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    extremes_ptr,
    records_ptr,
    arrivals_ptr,
    vocab_size,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature, _, _, has_top_k, has_top_p = row_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, row, vocab_size
    )
    if has_top_k | has_top_p | ((temperature > 0.0) & (tl.load(min_p_ptr + row) > 0.0)):
        index = block * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(
            logits_ptr + row * vocab_size + index, mask=index < vocab_size, other=float("-inf")
        )
        negated = tl.where(logits > float("-inf"), -logits, float("-inf"))
        extremes_ptr += 2 * row * tl.num_programs(0) + block
        tl.store(extremes_ptr, tl.max(logits, axis=0))
        tl.store(extremes_ptr + tl.num_programs(0), tl.max(negated, axis=0))
        if block == 0:
            tl.store(arrivals_ptr + row, 0)
            for which in tl.static_range(2):
                record_ptr = records_ptr + (2 * row + which) * RECORD_SIZE
                tl.store(record_ptr, 0)
                tl.store(record_ptr + 1, INT32_MAX)
                tl.store(record_ptr + 2, INT32_MIN)


@triton.jit
def _first_bracket(wanted, row_max):
    """All logits from minus infinity to the maximum; if not wanted, minus infinity alone."""
    lowest = tl.zeros_like(row_max) + float("-inf")
    high = float_of_key(ordered_key(tl.where(wanted, row_max, lowest)) + 1)
    return lowest, high, tl.zeros_like(row_max)


@triton.jit
def _store_state(state_ptr, k_bracket, p_bracket, kept_most, kept_least):
    for field in tl.static_range(3):
        tl.store(state_ptr + field, k_bracket[field])
        tl.store(state_ptr + 3 + field, p_bracket[field])
    tl.store(state_ptr + 6, kept_most)
    tl.store(state_ptr + 7, kept_least)


@triton.jit
def _narrow(bracket, edges, sums, enough, short):
    """A bracket after a round that found edges to have enough, or to fall short."""
    low = tl.maximum(bracket[0], tl.max(tl.where(enough, edges, float("-inf"))))
    high = tl.minimum(bracket[1], tl.min(tl.where(short, edges, float("inf"))))
    return low, high, tl.maximum(bracket[2], tl.max(tl.where(short, sums, 0.0)))


@triton.jit
def _row_sums(partials_ptr, num_blocks, BLOCKS: tl.constexpr):
    """Sums over a row's blocks of [num_blocks, edges]; zeros, without a read, of no blocks."""
    blocks = tl.arange(0, BLOCKS)[:, None]
    partials = tl.load(
        partials_ptr + blocks * EDGES + tl.arange(0, EDGES)[None, :],
        mask=blocks < num_blocks,
        other=0.0,
        cache_modifier=".cg",
    )
    return tl.sum(partials, axis=0)


@triton.jit
def _edges_in(k_bracket, p_bracket, k_start, p_start):
    """Where a round measures: evenly in the open bracket, or in each with half of the edges.

    A bracket that is open below has an edge at minus infinity, which measures all, and its other
    edges from its start, at which it may or may not have enough, to the largest logit.
    """
    p_open = is_open(p_bracket)
    both = p_open & is_open(k_bracket)
    index = tl.arange(0, EDGES)
    number = tl.where(both, EDGES // 2, EDGES)
    step = index % number
    for_p = p_open & (index >= EDGES - number)
    low = tl.where(for_p, p_bracket[0], k_bracket[0])
    top = float_of_key(ordered_key(tl.where(for_p, p_bracket[1], k_bracket[1])) - 1)
    unbounded = low == float("-inf")
    bottom = tl.where(unbounded, tl.where(for_p, p_start, k_start), low)
    from_start = tl.maximum(step - 1, 0) / (number - 2)
    share = tl.where(unbounded, from_start, (step + 1) / (number + 1))
    even = bottom * (1.0 - share) + top * share
    keys = ordered_key(bottom).to(tl.float32) * (1.0 - share)
    keys += ordered_key(top).to(tl.float32) * share
    even_keys = float_of_key(keys.to(tl.int32))
    edges = tl.minimum(tl.where(top - bottom > _WIDE, even_keys, even), top)
    return tl.where(unbounded & (step == 0), float("-inf"), edges)


@triton.jit
def round_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    extremes_ptr,
    states_ptr,
    sums_ptr,
    arrivals_ptr,
    vocab_size,
    FIRST: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A row's state has STATE_SIZE values, in this order:

    k_bracket: low and high end of top_k's bracket, and how many logits reach the high end.
    p_bracket: low and high end of top_p's bracket, and the mass that reaches the high end.
    kept_most, kept_least: bounds on the mass that top_k keeps: that which reaches its bracket's low
        end, and high end.
    edges: those of the next round.

    The bracket of a filter that the row has not is closed, at minus infinity.
    """
    block = tl.program_id(0)
    num_blocks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    temperature, top_k, top_p, has_top_k, has_top_p = row_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, row, vocab_size
    )
    if has_top_k | has_top_p:
        state_ptr = states_ptr + row * STATE_SIZE
        edge_ptrs = state_ptr + 8 + tl.arange(0, EDGES)
        extremes_ptr += 2 * row * num_blocks
        row_max = max_of(extremes_ptr, num_blocks, BLOCKS)
        floor = -max_of(extremes_ptr + num_blocks, num_blocks, BLOCKS)
        if FIRST:
            k_bracket = _first_bracket(has_top_k, row_max)
            p_bracket = _first_bracket(has_top_p, row_max)
            kept_most = tl.zeros_like(row_max) + float("inf")
            kept_least = tl.zeros_like(row_max)
            dropped = tl.where(has_top_p, 1.0 - top_p, 1.0)
            # Four times the bound's vocabulary, so that rounding cannot put the start too high.
            reach = temperature * tl.log(4.0 * vocab_size / dropped)
            p_start = tl.maximum(floor, row_max - reach)
            edges = _edges_in(k_bracket, p_bracket, floor, p_start)
            if block == 0:
                _store_state(state_ptr, k_bracket, p_bracket, kept_most, kept_least)
        else:
            k_bracket = load_bracket(state_ptr)
            p_bracket = load_bracket(state_ptr + 3)
            kept_most = tl.load(state_ptr + 6)
            kept_least = tl.load(state_ptr + 7)
            edges = tl.load(edge_ptrs)
        k_open = is_open(k_bracket)
        p_open = is_open(p_bracket)
        if k_open | p_open:
            first = block * BLOCK
            values_ptr = logits_ptr + row * vocab_size + first
            end = vocab_size - first
            counts_ptr = sums_ptr + 2 * row * num_blocks * EDGES
            masses_ptr = counts_ptr + num_blocks * EDGES
            partial = block * EDGES + tl.arange(0, EDGES)
            if k_open:
                counts = sums_at_edges(
                    values_ptr, BLOCK, end, edges, row_max, temperature, tl.int32, EDGES
                )
                tl.store(counts_ptr + partial, counts.to(tl.float32))
            if has_top_p:
                masses = sums_at_edges(
                    values_ptr, BLOCK, end, edges, row_max, temperature, tl.float32, EDGES
                )
                tl.store(masses_ptr + partial, masses)
            if arrived_last(arrivals_ptr + row, num_blocks):
                counts = _row_sums(counts_ptr, tl.where(k_open, num_blocks, 0), BLOCKS)
                masses = _row_sums(masses_ptr, tl.where(has_top_p, num_blocks, 0), BLOCKS)
                enough = tl.where(k_open, counts >= top_k, edges <= k_bracket[0])
                short = k_open & (counts < top_k)
                k_bracket = _narrow(k_bracket, edges, counts, enough, short)
                kept_most = tl.minimum(kept_most, tl.min(tl.where(enough, masses, float("inf"))))
                kept_least = tl.maximum(kept_least, tl.max(tl.where(short, masses, 0.0)))
                kept_least = tl.where(is_open(k_bracket), kept_least, kept_most)
                enough = p_open & (masses >= top_p * kept_most)
                short = p_open & (masses < top_p * kept_least)
                p_bracket = _narrow(p_bracket, edges, masses, enough, short)
                _store_state(state_ptr, k_bracket, p_bracket, kept_most, kept_least)
                tl.store(edge_ptrs, _edges_in(k_bracket, p_bracket, floor, floor))
