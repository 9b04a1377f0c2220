"""top_k, top_p and min_p as one logit threshold per row, without sorting the vocabulary.

The semantics are those of `nanovllm_core.logit_filters.keep_threshold`, for untouched logits: top_k
keeps what is at least the k-th largest; top_p then keeps, of that set, what is at least the largest
t whose set {logit >= t} has top_p of its mass; min_p keeps what has min_p of the largest
probability. Ties with a threshold are all kept. A row's temperature matters to top_p and min_p.

Where the caller knows that every row with top_k or top_p has a small top_k, few candidates decide.
The vocabulary is cut into groups of 128; the k-th largest of the groups' maxima bounds the k-th
largest logit from below, so only groups whose maximum reaches that bound can hold any of the k
largest: k groups, and those tied with the bound. One pass over the logits (4 V bytes a row) takes
the maxima, spread over the device; a second kernel reads 4 V / 128 bytes of maxima and the
candidates, and finds both thresholds in registers, by bisection on the logits' bit patterns, read
as integers that order like the floats.

Otherwise `row_threshold` searches whole rows, in four passes spread over the device.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels.checks import require_dtype, require_matrix, require_row_values
from nanovllm_core.kernels.row_brackets import float_of_key, ordered_key, with_min_p
from nanovllm_core.kernels.row_threshold import row_thresholds

_GROUP = 128
# Groups per block of the maxima kernel: 4096 logits, as in the race kernel.
_GROUPS_PER_BLOCK = 32
# With 2 * 64 candidate groups of 128, each of 256 threads holds 64 logits.
MAX_CANDIDATE_TOP_K = 64


@triton.jit
def _middle(low, high):
    """floor((low + high) / 2) of int32 without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _kth_largest(keys, k, low, high):
    """Largest t in [low, high) with at least k of keys >= t, which must hold at low."""
    while high > low + 1:
        middle = _middle(low, high)
        enough = tl.sum(tl.sum((keys >= middle).to(tl.int32), axis=1), axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def _group_maxima_kernel(
    logits_ptr, maxima_ptr, vocab_size, num_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    index = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    logits = tl.load(
        logits_ptr + row * vocab_size + index, mask=index < vocab_size, other=float("-inf")
    )
    tl.store(
        maxima_ptr + row * num_groups + groups, tl.max(logits, axis=1), mask=groups < num_groups
    )


@triton.jit
def _candidate_threshold_kernel(
    logits_ptr,
    maxima_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    candidate_groups_ptr,
    threshold_ptr,
    vocab_size,
    num_groups,
    GROUP: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    offsets = tl.arange(0, GROUPS_PADDED)
    inside = offsets < num_groups
    maxima = tl.load(maxima_ptr + row * num_groups + offsets, mask=inside, other=float("-inf"))
    row_max = tl.max(maxima, axis=0)
    threshold = float("-inf")
    if (temperature > 0.0) & (top_k > 0) & (top_k < vocab_size):
        keys = ordered_key(maxima)
        max_key = ordered_key(row_max)
        lowest = tl.min(tl.where(inside, keys, max_key), axis=0)
        bound = _kth_largest(keys[None, :], min(top_k, num_groups), lowest, max_key + 1)
        above = inside & (keys > bound)
        tied = inside & (keys == bound)
        room = CANDIDATES - tl.sum(above.to(tl.int32), axis=0)
        chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), axis=0) <= room))
        slots = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        tl.store(candidate_groups_ptr + row * CANDIDATES + slots, offsets, mask=chosen)
        num_chosen = tl.sum(chosen.to(tl.int32), axis=0)
        # The list is read back by other threads of this block than those that wrote it.
        tl.debug_barrier()
        slots = tl.arange(0, CANDIDATES)
        groups = tl.load(
            candidate_groups_ptr + row * CANDIDATES + slots,
            mask=slots < num_chosen,
            other=num_groups,
        )
        index = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        logits = tl.load(
            logits_ptr + row * vocab_size + index, mask=index < vocab_size, other=float("-inf")
        )
        keys = ordered_key(logits)
        # Fewer groups than top_k bound nothing, but then all of them are candidates.
        lowest = ordered_key(tl.full([], float("-inf"), dtype=tl.float32))
        bound = tl.where(top_k <= num_groups, bound, lowest)
        low = _kth_largest(keys, top_k, bound, max_key + 1)
        top_p = tl.load(top_p_ptr + row)
        if top_p < 1.0:
            masses = tl.exp((logits - row_max) / temperature)
            masses = tl.where(keys >= low, masses, 0.0)
            wanted = top_p * tl.sum(tl.sum(masses, axis=1), axis=0)
            high = max_key + 1
            while high > low + 1:
                middle = _middle(low, high)
                mass = tl.sum(tl.sum(tl.where(keys >= middle, masses, 0.0), axis=1), axis=0)
                enough = mass >= wanted
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
        threshold = float_of_key(low)
    threshold = with_min_p(threshold, row_max, temperature, tl.load(min_p_ptr + row))
    tl.store(threshold_ptr + row, threshold)


def filter_thresholds(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    max_top_k: int = 0,
) -> Tensor:
    """The smallest logit of each row that may be sampled, for `sampling.sample_tokens`.

    Args:
        logits: [rows, vocab_size] float32, before temperature.
        temperature: [rows] float32; rows with 0 are greedy and are not filtered.
        top_k: [rows] int32; 0 and less, or vocab_size and more, keeps all.
        top_p: [rows] float32 in (0, 1]; 1 keeps all.
        min_p: [rows] float32 in [0, 1]; 0 keeps all.
        max_top_k: largest top_k, if every row with top_k or top_p has one; 0 if not known. Up to
            MAX_CANDIDATE_TOP_K it allows the fast way. There, ties with the k-th largest logit in
            more than max_top_k further groups of 128 ids do not count towards top_p's mass.

    Returns:
        [rows] float32; minus infinity in rows that keep all.

    Raises:
        KernelInputError: a shape, dtype or layout does not fit.
    """
    require_matrix("logits", logits, None, None)
    require_dtype("logits", logits, torch.float32)
    rows, vocab_size = logits.shape
    require_row_values("temperature", temperature, rows, torch.float32)
    require_row_values("top_k", top_k, rows, torch.int32)
    require_row_values("top_p", top_p, rows, torch.float32)
    require_row_values("min_p", min_p, rows, torch.float32)
    if rows == 0:
        return torch.empty(0, dtype=torch.float32, device=logits.device)
    if not 0 < max_top_k <= MAX_CANDIDATE_TOP_K:
        return row_thresholds(logits, temperature, top_k, top_p, min_p)
    threshold = torch.empty(rows, dtype=torch.float32, device=logits.device)
    num_groups = triton.cdiv(vocab_size, _GROUP)
    candidates = max(16, triton.next_power_of_2(2 * max_top_k))
    maxima = torch.empty(rows, num_groups, dtype=torch.float32, device=logits.device)
    candidate_groups = torch.empty(rows, candidates, dtype=torch.int32, device=logits.device)
    _group_maxima_kernel[(triton.cdiv(num_groups, _GROUPS_PER_BLOCK), rows)](
        logits,
        maxima,
        vocab_size,
        num_groups,
        GROUP=_GROUP,
        GROUPS=_GROUPS_PER_BLOCK,
        num_warps=8,
    )
    _candidate_threshold_kernel[(rows,)](
        logits,
        maxima,
        temperature,
        top_k,
        top_p,
        min_p,
        candidate_groups,
        threshold,
        vocab_size,
        num_groups,
        GROUP=_GROUP,
        GROUPS_PADDED=triton.next_power_of_2(num_groups),
        CANDIDATES=candidates,
        num_warps=8,
    )
    return threshold


def filter_thresholds_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The definition by sorting, masses in float64: [rows] float64."""
    rows, vocab_size = logits.shape
    threshold = torch.full((rows,), float("-inf"), dtype=torch.float64, device=logits.device)
    for row in range(rows):
        warmth, k, p, m = (tensor[row].item() for tensor in (temperature, top_k, top_p, min_p))
        if warmth <= 0:
            continue
        values = logits[row].double().sort(descending=True).values
        if 0 < k < vocab_size:
            values = values[values >= values[k - 1]]
            threshold[row] = values[-1]
        if p < 1:
            masses = ((values - values[0]) / warmth).exp()
            before = masses.cumsum(0) - masses
            threshold[row] = values[before < p * masses.sum()].min()
        if m > 0:
            bound = values[0] + warmth * torch.tensor(m, dtype=torch.float64).log()
            threshold[row] = torch.maximum(threshold[row], bound)
    return threshold
