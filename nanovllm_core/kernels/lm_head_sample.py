"""LM head and sampling in one kernel: for few rows the logits never reach memory.

    logits[r, v] = sum_k h[r, k] * W[v, k];    token[r] = argmax_v logits[r, v] - T[r] log e[r, v]

h is the final hidden state, or with a norm weight the RMSNorm of the residual stream: the norm's
weight multiplies the row in registers rather than W, which tied embeddings share. The random
numbers are those of `sampling.py`.

Bytes moved: 2 V K for the weight; Qwen3-0.6B (V = 151,936, K = 1024) 311 MB, 102 us at 3.06 TB/s.
Each block leaves one winner per row and a second kernel races the winners.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels import launch
from nanovllm_core.kernels.checks import (
    KernelInputError,
    require_dtype,
    require_matrix,
    require_shape,
)
from nanovllm_core.kernels.counter_random import race_scores, row_words
from nanovllm_core.kernels.device import start_dependents
from nanovllm_core.kernels.launch import MAX_LM_HEAD_ROWS, GemvConfig, LmHeadConfig
from nanovllm_core.kernels.linear_tiles import (
    inverse_rms,
    load_activation_row,
    load_weight_rows,
    multiply_rows,
)
from nanovllm_core.kernels.sampling import check_sampling_arguments, reduce_race


@triton.jit
def _lm_head_kernel(
    x_ptr,
    norm_weight_ptr,
    w_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    best_scores_ptr,
    best_ids_ptr,
    vocab_size,
    eps,
    K: tl.constexpr,
    K_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    NORMED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_dependents(DEPENDENT)
    program = tl.program_id(0)
    rows = tl.arange(0, ROWS_PADDED)
    inside_rows = rows < ROWS
    temperature = tl.load(temperature_ptr + rows, mask=inside_rows, other=0.0)
    seeds = tl.load(seeds_ptr + rows, mask=inside_rows, other=0)
    positions = tl.load(positions_ptr + rows, mask=inside_rows, other=0)
    low, high = row_words(seeds, positions)
    columns = tl.arange(0, K_PADDED)
    best = tl.full([ROWS_PADDED], float("-inf"), dtype=tl.float32)
    best_ids = tl.zeros([ROWS_PADDED], dtype=tl.int32) + program * BLOCKS * BLOCK_N
    for block in range(BLOCKS):
        first = (program * BLOCKS + block) * BLOCK_N
        ids = first + tl.arange(0, BLOCK_N)
        w = load_weight_rows(w_ptr, ids, vocab_size, 0, K, K_PADDED)
        # Rows are collected into one small matrix, so that the race's arithmetic is spread over the
        # threads: each row's sums alone are held by all threads alike.
        logits = tl.zeros([ROWS_PADDED, BLOCK_N], dtype=tl.float32)
        for row in tl.static_range(ROWS):
            x = load_activation_row(x_ptr, row, 0, K, K_PADDED)
            if NORMED:
                scale = inverse_rms(x, eps, K)
                norm_weight = tl.load(norm_weight_ptr + columns, mask=columns < K, other=0.0)
                x = x * scale * norm_weight.to(tl.float32)
            logits = tl.where(rows[:, None] == row, multiply_rows(w, x)[None, :], logits)
        scores = race_scores(
            logits, temperature[:, None], low[:, None], high[:, None], ids[None, :]
        )
        scores = tl.where((ids < vocab_size)[None, :], scores, float("-inf"))
        block_best, where_best = tl.max(scores, axis=1, return_indices=True)
        # Strictly greater: of equal scores the earlier block holds the lower ids.
        better = block_best > best
        best = tl.where(better, block_best, best)
        best_ids = tl.where(better, first + where_best, best_ids)
    partials = rows * tl.num_programs(0) + program
    tl.store(best_scores_ptr + partials, best, mask=inside_rows)
    tl.store(best_ids_ptr + partials, best_ids, mask=inside_rows)


def lm_head_sample(
    x: Tensor,
    weight: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    config: LmHeadConfig | None = None,
    dependent: bool = False,
) -> Tensor:
    """Greedy or temperature sample of softmax(h @ weight^T / T), logits in float32.

    Args:
        x: [rows, K] of weight's dtype, at most `launch.MAX_LM_HEAD_ROWS` rows.
        weight: [vocab_size, K].
        temperature: [rows] float32; 0 is greedy.
        seeds, positions: [rows] int64, the key of each row's random numbers.
        norm_weight: [K]; given, h is RMSNorm(x) * norm_weight, else h is x.
        eps: the norm's epsilon.
        config: launch configuration; None takes `launch`'s for the number of rows.
        dependent: programmatic dependent launch, see `rms_norm_linear`.

    Returns:
        [rows] int32 token ids.

    Raises:
        KernelInputError: a shape, dtype or layout does not fit, or there are too many rows.
    """
    require_matrix("x", x, None, None)
    rows, k_size = x.shape
    require_matrix("weight", weight, None, k_size)
    require_dtype("weight", weight, x.dtype)
    check_sampling_arguments(rows, temperature, seeds, positions)
    if norm_weight is not None:
        require_shape("norm_weight", norm_weight, (k_size,))
    if rows > MAX_LM_HEAD_ROWS:
        raise KernelInputError(
            f"lm_head_sample takes at most {MAX_LM_HEAD_ROWS} rows, got {rows}; compute the logits "
            f"with a matrix product and call sample_tokens"
        )
    if rows == 0:
        return torch.empty(0, dtype=torch.int32, device=x.device)
    vocab_size = weight.shape[0]
    if config is None:
        config = launch.LM_HEAD_SAMPLE if rows <= 2 else launch.LM_HEAD_SAMPLE_ROWS
    k_padded = triton.next_power_of_2(k_size)
    block_n = GemvConfig(config.block_n, config.num_warps).fitted_block_n(k_padded)
    blocks = config.blocks_per_program
    num_programs = triton.cdiv(vocab_size, block_n * blocks)
    best_scores = torch.empty(rows, num_programs, dtype=torch.float32, device=x.device)
    best_ids = torch.empty(rows, num_programs, dtype=torch.int32, device=x.device)
    _lm_head_kernel[(num_programs,)](
        x,
        norm_weight,
        weight,
        temperature,
        seeds,
        positions,
        best_scores,
        best_ids,
        vocab_size,
        eps,
        K=k_size,
        K_PADDED=k_padded,
        ROWS=rows,
        ROWS_PADDED=triton.next_power_of_2(rows),
        BLOCK_N=block_n,
        BLOCKS=blocks,
        NORMED=norm_weight is not None,
        DEPENDENT=dependent,
        **config.options(dependent),
    )
    return reduce_race(best_scores, best_ids, dependent=dependent)


def lm_head_reference(
    x: Tensor, weight: Tensor, norm_weight: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """Logits in float64: [rows, vocab_size]."""
    hidden = x.double()
    if norm_weight is not None:
        scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)
        hidden = hidden * scale * norm_weight.double()
    return hidden @ weight.double().T
