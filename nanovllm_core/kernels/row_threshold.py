"""top_k, top_p and min_p as one logit threshold per row, found over the whole row by many blocks.

Both filters ask for the largest t whose set {logit >= t} has enough: top_k logits, or top_p of the
mass of what top_k keeps. A round measures the count and the mass of the logits that reach each of
16 edges. That leaves t between two edges, in a bracket [low, high) whose low end has enough and
whose high end has not. Launches and grids are fixed, and nothing waits for the host:

1. the largest and the least finite logit of every block;
2. two rounds. The block of a row that arrives last adds up the row's sums, narrows the brackets and
   sets the next edges, evenly between logits. For top_p they start where the nucleus must end:
   logits more than T log(V / (1 - top_p)) below the maximum have less than 1 - top_p of the mass.
   Two rounds narrow a bracket some 250 times, and some 50 times in rows with both filters, where
   each has half of the edges;
3. the logits in each bracket, as a rule few of the row's, are copied into a list;
4. one block per row ends the search in its lists, with edges evenly between bit patterns.

Where a list overflows, the last step reads the row instead. Ties do not slow that down, as it
narrows a bracket to its extreme logits first; thousands of unlike logits close together do.

While top_k's bracket is open, two bounds on the mass that it keeps are known, and an end of top_p's
bracket moves only where both agree. Sums of a round have one order. Blocks append to a list in any
order, so the masses in it are added as integers. Thus a row's result depends on the row alone.

Blocks of rows without top_k and top_p return at once, those of a row whose brackets have closed
before they read logits. Bytes moved per row: 4 V in each of four launches, 2.4 MB for Qwen3's
vocabulary, most of them from the L2 cache while the rows fit in it. With many rows the comparisons
with 16 edges take longer than the bytes.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels.row_brackets import (
    BLOCK,
    EDGES,
    INT32_MAX,
    INT32_MIN,
    MASS_UNITS,
    NUM_WARPS,
    RECORD_SIZE,
    STATE_SIZE,
    THREADS,
    float_of_key,
    is_open,
    load_bracket,
    max_of,
    ordered_key,
    row_filters,
    sums_at_edges,
    with_min_p,
)
from nanovllm_core.kernels.row_rounds import extremes_kernel, round_kernel

_ROUNDS = 2
_LIST_SIZE = 8192


@triton.jit
def _append_bracket(values_ptr, end, bracket, list_ptr, record_ptr, LIST_SIZE: tl.constexpr):
    """Append a block's logits in a bracket to a list, and count them in its record.

    The record is right where the list overflows, too.
    """
    number = tl.zeros([THREADS], dtype=tl.int32)
    least = tl.full([THREADS], INT32_MAX, dtype=tl.int32)
    largest = tl.full([THREADS], INT32_MIN, dtype=tl.int32)
    for start in tl.range(0, BLOCK, THREADS, loop_unroll_factor=8):
        index = start + tl.arange(0, THREADS)
        values = tl.load(values_ptr + index, mask=index < end, other=float("inf"))
        chosen = (values >= bracket[0]) & (values < bracket[1])
        keys = ordered_key(values)
        number += chosen.to(tl.int32)
        least = tl.where(chosen, tl.minimum(least, keys), least)
        largest = tl.where(chosen, tl.maximum(largest, keys), largest)
    if tl.sum(number, axis=0) > 0:
        tl.atomic_min(record_ptr + 1, tl.min(least), sem="relaxed")
        tl.atomic_max(record_ptr + 2, tl.max(largest), sem="relaxed")
        # One addition a thread: additions to one address wait for each other.
        record_ptrs = record_ptr + tl.zeros_like(number)
        slots = tl.atomic_add(record_ptrs, number, mask=number > 0, sem="relaxed")
        for start in tl.range(0, BLOCK, THREADS, loop_unroll_factor=8):
            index = start + tl.arange(0, THREADS)
            values = tl.load(values_ptr + index, mask=index < end, other=float("inf"))
            chosen = (values >= bracket[0]) & (values < bracket[1])
            tl.store(list_ptr + slots, values, mask=chosen & (slots < LIST_SIZE))
            slots += chosen.to(tl.int32)


@triton.jit
def _list_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    states_ptr,
    lists_ptr,
    records_ptr,
    vocab_size,
    LIST_SIZE: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    _, _, _, has_top_k, has_top_p = row_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, row, vocab_size
    )
    if has_top_k | has_top_p:
        first = tl.program_id(0) * BLOCK
        values_ptr = logits_ptr + row * vocab_size + first
        end = vocab_size - first
        list_ptr = lists_ptr + 2 * row * LIST_SIZE
        record_ptr = records_ptr + 2 * row * RECORD_SIZE
        bracket = load_bracket(states_ptr + row * STATE_SIZE)
        if is_open(bracket):
            _append_bracket(values_ptr, end, bracket, list_ptr, record_ptr, LIST_SIZE)
        bracket = load_bracket(states_ptr + row * STATE_SIZE + 3)
        if is_open(bracket):
            list_ptr += LIST_SIZE
            record_ptr += RECORD_SIZE
            _append_bracket(values_ptr, end, bracket, list_ptr, record_ptr, LIST_SIZE)


@triton.jit
def _listed(list_ptr, record_ptr, row_ptr, vocab_size, LIST_SIZE: tl.constexpr):
    """A bracket's list, its length and True; the row, its length and False if it overflowed."""
    number = tl.load(record_ptr)
    fits = number <= LIST_SIZE
    return tl.where(fits, list_ptr, row_ptr), tl.where(fits, number, vocab_size), fits


@triton.jit
def _search(values_ptr, number, record_ptr, low, wanted, row_max, temperature, DTYPE: tl.constexpr):
    """The largest of the logits in a bracket that wanted of the values reach."""
    any_listed = tl.load(record_ptr) > 0
    low_key = tl.where(any_listed, tl.load(record_ptr + 1), ordered_key(low)).to(tl.int64)
    high_key = tl.load(record_ptr + 2).to(tl.int64) + 1
    while high_key > low_key + 1:
        keys = low_key + (high_key - low_key) * (tl.arange(0, EDGES) + 1) // (EDGES + 1)
        edges = float_of_key(keys.to(tl.int32))
        sums = sums_at_edges(values_ptr, number, number, edges, row_max, temperature, DTYPE, EDGES)
        enough = sums >= wanted
        low_key = tl.max(tl.where(enough, keys, low_key), axis=0)
        high_key = tl.min(tl.where(enough, high_key, keys), axis=0)
    return float_of_key(low_key.to(tl.int32))


@triton.jit
def _final_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    extremes_ptr,
    states_ptr,
    lists_ptr,
    records_ptr,
    threshold_ptr,
    vocab_size,
    num_blocks,
    BLOCKS: tl.constexpr,
    LIST_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p, has_top_k, has_top_p = row_filters(
        temperature_ptr, top_k_ptr, top_p_ptr, row, vocab_size
    )
    row_max = max_of(extremes_ptr + 2 * row * num_blocks, num_blocks, BLOCKS)
    threshold = float("-inf")
    if has_top_k | has_top_p:
        state_ptr = states_ptr + row * STATE_SIZE
        k_bracket = load_bracket(state_ptr)
        p_bracket = load_bracket(state_ptr + 3)
        kept = tl.load(state_ptr + 6)
        row_ptr = logits_ptr + row * vocab_size
        list_ptr = lists_ptr + 2 * row * LIST_SIZE
        record_ptr = records_ptr + 2 * row * RECORD_SIZE
        k_threshold = k_bracket[0]
        if is_open(k_bracket):
            values_ptr, number, fits = _listed(list_ptr, record_ptr, row_ptr, vocab_size, LIST_SIZE)
            wanted = top_k - tl.where(fits, k_bracket[2], 0.0).to(tl.int32)
            k_threshold = _search(
                values_ptr, number, record_ptr, k_threshold, wanted, row_max, temperature, tl.int32
            )
            if has_top_p:
                edge = tl.zeros([1], dtype=tl.float32) + k_threshold
                units = sums_at_edges(
                    values_ptr, number, number, edge, row_max, temperature, tl.int64, 1
                )
                kept = tl.sum(units).to(tl.float32) / MASS_UNITS
                kept += tl.where(fits, tl.load(state_ptr + 7), 0.0)
        p_threshold = p_bracket[0]
        if is_open(p_bracket):
            list_ptr += LIST_SIZE
            record_ptr += RECORD_SIZE
            values_ptr, number, fits = _listed(list_ptr, record_ptr, row_ptr, vocab_size, LIST_SIZE)
            wanted = (top_p * kept * MASS_UNITS).to(tl.int64)
            wanted -= (tl.where(fits, p_bracket[2], 0.0) * MASS_UNITS).to(tl.int64)
            p_threshold = _search(
                values_ptr, number, record_ptr, p_threshold, wanted, row_max, temperature, tl.int64
            )
        threshold = tl.maximum(k_threshold, p_threshold)
    threshold = with_min_p(threshold, row_max, temperature, tl.load(min_p_ptr + row))
    tl.store(threshold_ptr + row, threshold)


def row_thresholds(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """`filter_thresholds` for any top_k, of arguments that it has checked."""
    rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK.value)
    padded = triton.next_power_of_2(num_blocks)

    def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=logits.device)

    extremes = buffer(2, num_blocks)
    states = buffer(STATE_SIZE.value)
    sums = buffer(2, num_blocks, EDGES.value)
    arrivals = buffer(dtype=torch.int32)
    lists = buffer(2, _LIST_SIZE)
    records = buffer(2, RECORD_SIZE.value, dtype=torch.int32)
    threshold = buffer()

    filters = (logits, temperature, top_k, top_p)
    grid = (num_blocks, rows)
    extremes_kernel[grid](
        *filters, min_p, extremes, records, arrivals, vocab_size, num_warps=NUM_WARPS
    )
    for index in range(_ROUNDS):
        round_kernel[grid](
            *filters,
            extremes,
            states,
            sums,
            arrivals,
            vocab_size,
            FIRST=index == 0,
            BLOCKS=padded,
            num_warps=NUM_WARPS,
        )
    _list_kernel[grid](
        *filters, states, lists, records, vocab_size, LIST_SIZE=_LIST_SIZE, num_warps=NUM_WARPS
    )
    _final_kernel[(rows,)](
        *filters,
        min_p,
        extremes,
        states,
        lists,
        records,
        threshold,
        vocab_size,
        num_blocks,
        BLOCKS=padded,
        LIST_SIZE=_LIST_SIZE,
        num_warps=NUM_WARPS,
    )
    return threshold
