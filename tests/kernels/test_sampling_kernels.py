"""Sampling kernels: the same random numbers, tokens and thresholds as the torch sampler."""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import pytest
import torch
import triton
import triton.language as tl

from nanovllm_core import random as definition
from nanovllm_core.kernels import counter_random
from nanovllm_core.kernels.checks import KernelInputError
from nanovllm_core.kernels.filter_threshold import (
    filter_thresholds,
    filter_thresholds_reference,
)
from nanovllm_core.kernels.launch import MAX_LM_HEAD_ROWS, LmHeadConfig
from nanovllm_core.kernels.lm_head_sample import lm_head_reference, lm_head_sample
from nanovllm_core.kernels.sampling import sample_tokens, sample_tokens_reference
from tests.kernels.support import DTYPES

EXTREME_KEYS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]


@triton.jit
def _random_kernel(seeds_ptr, positions_ptr, bits_ptr, noise_ptr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    low, high = counter_random.row_words(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    index = tl.arange(0, BLOCK)
    bits = counter_random.random_bits(low, high, index)
    tl.store(bits_ptr + row * BLOCK + index, bits.to(tl.int32, bitcast=True))
    noise = counter_random.exponential_noise(low, high, index)
    tl.store(noise_ptr + row * BLOCK + index, noise)


def random_values(device, rows, block):
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
    positions = torch.randint(0, 1 << 40, (rows,), device=device)
    seeds[: len(EXTREME_KEYS)] = torch.tensor(EXTREME_KEYS, device=device)
    bits = torch.empty(rows, block, dtype=torch.int32, device=device)
    noise = torch.empty(rows, block, device=device)
    _random_kernel[(rows,)](seeds, positions, bits, noise, BLOCK=block)
    return seeds, positions, bits, noise


def test_random_bits_equal_the_definition_bit_for_bit(device):
    seeds, positions, bits, _ = random_values(device, 16, 1024)
    assert torch.equal(bits, definition.random_bits(seeds, positions, 1024))


def test_noise_is_accurate_where_races_are_decided(device):
    seeds, positions, bits, noise = random_values(device, 16, 8192)
    uniform = (bits.view(torch.uint32).double() + 0.5) * 2.0**-32
    exact = -torch.log1p(-uniform)
    small = exact < 20
    assert small.sum() > 100_000
    assert exact.min() < 1e-4
    relative = ((noise.double() - exact) / exact).abs()[small]
    # Near u = 1 the float32 rounding of u itself is what remains.
    assert relative[exact[small] < 2].max() < 2e-6
    torch.testing.assert_close(noise, definition.exponential_noise(seeds, positions, 8192))


def sampling_rows(rows, device):
    temperature = 0.2 + 1.5 * torch.rand(rows, device=device)
    temperature[::4] = 0.0
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)
    positions = torch.randint(0, 4096, (rows,), device=device)
    return temperature, seeds, positions


def assert_drawn(tokens, scores, slack):
    """Each token has the best score, or one that rounding cannot tell from it."""
    assert tokens.dtype == torch.int32
    chosen = scores.gather(1, tokens.long()[:, None]).squeeze(1)
    assert (chosen >= scores.amax(dim=1) - slack).all()


@pytest.mark.parametrize("vocab_size", [1, 320, 4096, 9001])
def test_tokens_are_those_of_the_torch_sampler(vocab_size, device):
    logits = 3 * torch.randn(8, vocab_size, device=device)
    rows = sampling_rows(8, device)
    tokens = sample_tokens(logits, *rows)
    scores = sample_tokens_reference(logits, *rows)
    assert_drawn(tokens, scores, slack=1e-5)
    assert torch.equal(tokens.long(), scores.argmax(dim=1))


def test_greedy_takes_the_lowest_of_equal_ids(device):
    logits = torch.zeros(2, 9000, device=device)
    logits[0, [300, 4500, 8999]] = 1.0
    logits[1, [8191, 8192]] = 1.0
    zero = torch.zeros(2, device=device)
    key = torch.zeros(2, dtype=torch.int64, device=device)
    assert sample_tokens(logits, zero, key, key).tolist() == [300, 8191]


def test_a_temperature_close_to_zero_is_greedy_and_does_not_overflow(device):
    logits = 50 * torch.randn(4, 500, device=device)
    temperature = torch.full((4,), 1e-38, device=device)
    key = torch.arange(4, device=device)
    tokens = sample_tokens(logits, temperature, key, key)
    assert torch.equal(tokens.long(), logits.argmax(dim=1))


def test_draws_follow_the_softmax_distribution(device):
    draws, temperature = 300, 0.7
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5], device=device)
    tokens = sample_tokens(
        logits.repeat(draws, 1),
        torch.full((draws,), temperature, device=device),
        torch.arange(draws, device=device),
        torch.full((draws,), 7, device=device),
    )
    probabilities = (logits / temperature).softmax(dim=0)
    counts = torch.bincount(tokens.long(), minlength=5)
    chi_square = ((counts - draws * probabilities) ** 2 / (draws * probabilities)).sum()
    # 99.99 % of chi-square with 4 degrees of freedom lie below 23.5.
    assert chi_square < 23.5


def filter_rows(device):
    """temperature, top_k, top_p, min_p: each filter alone, together, off, and a greedy row."""
    columns = torch.tensor(
        [
            # T, k, p, m
            [1.0, 5, 1.0, 0.0],
            [0.6, 20, 0.95, 0.0],
            [0.8, 20, 0.5, 0.1],
            [1.3, 1, 0.9, 0.0],
            [0.0, 5, 0.5, 0.5],
            [1.0, 0, 1.0, 0.2],
            [1.0, 1 << 20, 1.0, 0.0],
            [0.7, 3, 1e-6, 0.0],
            [0.7, 20, 1.0, 1.0],
        ],
        device=device,
    )
    temperature, top_k, top_p, min_p = columns.unbind(1)
    return (
        temperature.contiguous(),
        top_k.to(torch.int32),
        top_p.contiguous(),
        min_p.contiguous(),
    )


@pytest.mark.parametrize("max_top_k", [0, 20], ids=["whole-rows", "candidates"])
@pytest.mark.parametrize("vocab_size", [300, 5000])
def test_thresholds_keep_what_sorting_keeps(vocab_size, max_top_k, device):
    rows = filter_rows(device)
    logits = 2 * torch.randn(len(rows[0]), vocab_size, device=device)
    threshold = filter_thresholds(logits, *rows, max_top_k=max_top_k)
    expected = filter_thresholds_reference(logits, *rows)
    kept = logits >= threshold[:, None]
    assert torch.equal(kept, logits.double() >= expected[:, None])


def test_top_p_without_top_k_keeps_the_nucleus_of_the_whole_row(device):
    rows = 4
    logits = 2 * torch.randn(rows, 9000, device=device)
    temperature = torch.tensor([0.5, 1.0, 1.5, 1.0], device=device)
    top_p = torch.tensor([0.9, 0.95, 0.3, 1.0], device=device)
    top_k = torch.zeros(rows, dtype=torch.int32, device=device)
    min_p = torch.zeros(rows, device=device)
    threshold = filter_thresholds(logits, temperature, top_k, top_p, min_p)
    expected = filter_thresholds_reference(logits, temperature, top_k, top_p, min_p)
    kept = (logits >= threshold[:, None]).sum(dim=1)
    wanted = (logits.double() >= expected[:, None]).sum(dim=1)
    # Summing the mass in another order may move the edge of a nucleus by a token.
    assert (kept - wanted).abs().max() <= 1
    assert kept[3] == 9000


@pytest.mark.parametrize("max_top_k", [0, 8], ids=["whole-rows", "candidates"])
def test_ties_with_the_kth_largest_are_all_kept(max_top_k, device):
    logits = torch.zeros(1, 2000, device=device)
    logits[0, [5, 700, 1500]] = 2.0
    logits[0, [6, 130, 900, 1999]] = 1.0
    one = torch.ones(1, device=device)
    threshold = filter_thresholds(
        logits,
        one,
        torch.tensor([4], dtype=torch.int32, device=device),
        one,
        torch.zeros(1, device=device),
        max_top_k=max_top_k,
    )
    assert threshold.item() == 1.0
    assert (logits >= threshold[:, None]).sum() == 7


@pytest.mark.parametrize("max_top_k", [0, 64], ids=["whole-rows", "candidates"])
def test_logits_that_are_all_equal_or_masked_have_a_finite_threshold(max_top_k, device):
    logits = torch.zeros(2, 20_000, device=device)
    logits[1] = float("-inf")
    logits[1, 17_000] = -3.0
    one = torch.ones(2, device=device)
    threshold = filter_thresholds(
        logits,
        one,
        torch.tensor([64, 1], dtype=torch.int32, device=device),
        0.9 * one,
        0 * one,
        max_top_k=max_top_k,
    )
    assert threshold.tolist() == [0.0, -3.0]


def test_a_filtered_draw_stays_above_the_threshold_and_races_the_rest(device):
    rows = filter_rows(device)
    logits = 2 * torch.randn(len(rows[0]), 5000, device=device)
    threshold = filter_thresholds(logits, *rows, max_top_k=20)
    seeds = torch.arange(len(logits), device=device)
    tokens = sample_tokens(logits, rows[0], seeds, seeds, threshold=threshold)
    scores = sample_tokens_reference(
        logits, rows[0], seeds, seeds, allowed=logits >= threshold[:, None]
    )
    assert torch.equal(tokens.long(), scores.argmax(dim=1))


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1000), (3, 997)])
def test_lm_head_sample_draws_from_the_logits_it_never_stores(
    rows, vocab_size, dtype, normed, device
):
    k_size = 96
    x = (2 * torch.randn(rows, k_size)).to(device, dtype)
    weight = (torch.randn(vocab_size, k_size) / 5).to(device, dtype)
    norm_weight = (1 + 0.3 * torch.randn(k_size)).to(device, dtype) if normed else None
    keys = sampling_rows(rows, device)
    config = LmHeadConfig(block_n=16, blocks_per_program=3, num_warps=4)
    tokens = lm_head_sample(x, weight, *keys, norm_weight=norm_weight, eps=1e-6, config=config)
    logits = lm_head_reference(x, weight, norm_weight, 1e-6)
    assert_drawn(tokens, sample_tokens_reference(logits, *keys), slack=1e-4)


def test_lm_head_sample_refuses_more_rows_than_its_registers_hold(device):
    rows = MAX_LM_HEAD_ROWS + 1
    with pytest.raises(KernelInputError, match=f"at most {MAX_LM_HEAD_ROWS} rows"):
        lm_head_sample(
            torch.zeros(rows, 32, device=device),
            torch.zeros(64, 32, device=device),
            *sampling_rows(rows, device),
        )
