"""Sampling as a distribution: thousands of seeds at once, against exact probabilities."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm_core.logit_filters import keep_threshold, sorted_threshold
from nanovllm_core.sampler import sample
from tests.core.sampling_rows import make_batch

NUM_DRAWS = 20_000
VOCAB_SIZE = 40


def random_logits(rows: int, vocab_size: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def warped(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """transformers' logits after its warpers, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    history: Any = torch.zeros((logits.shape[0], 1), dtype=torch.int64)
    scores: Any = logits.clone()
    result: Tensor = warpers(history, scores)
    return result


def draws(logits: Tensor, **fields: Any) -> np.ndarray:
    """Token counts over NUM_DRAWS seeds for one row of logits."""
    batch = make_batch(NUM_DRAWS, any_random=True, **fields)
    tokens = sample(logits.expand(NUM_DRAWS, -1).clone(), batch).token_ids
    return np.bincount(tokens.numpy(), minlength=logits.shape[1])


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 0.8, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 12, "top_p": 0.8},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    ],
)
def test_frequencies_match_the_exact_probabilities(params: dict[str, Any]) -> None:
    logits = random_logits(1, VOCAB_SIZE)
    exact = warped(logits, **params).double().softmax(-1)[0].numpy()
    counts = draws(logits, any_filter=len(params) > 1, **params)
    assert counts[exact == 0].sum() == 0
    # The chi-square approximation wants a handful of expected draws per cell.
    is_rare = exact * NUM_DRAWS < 8
    observed = np.append(counts[~is_rare], counts[is_rare].sum())
    expected = np.append(exact[~is_rare], exact[is_rare].sum()) * NUM_DRAWS
    cells = expected > 0
    if cells.sum() > 1:
        assert stats.chisquare(observed[cells], expected[cells]).pvalue > 1e-4
    assert np.abs(counts / NUM_DRAWS - exact).sum() / 2 < 0.02


def test_draws_at_successive_positions_are_independent() -> None:
    logits = torch.zeros(NUM_DRAWS, 4)
    seeds = torch.arange(NUM_DRAWS)
    first, second = (
        sample(
            logits.clone(),
            make_batch(
                NUM_DRAWS,
                any_random=True,
                temperature=1.0,
                seeds=seeds,
                positions=torch.full((NUM_DRAWS,), position),
            ),
        ).token_ids.numpy()
        for position in (10, 11)
    )
    table = np.zeros((4, 4))
    np.add.at(table, (first, second), 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    top_k=st.integers(0, 60),
    top_p=st.sampled_from([0.05, 0.3, 0.75, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
@settings(max_examples=150, deadline=None)
def test_kept_sets_equal_those_of_transformers(
    seed: int, scale: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(3, 50, seed, scale)
    logits -= logits.amax(-1, keepdim=True)
    expected = warped(logits, 1.0, top_k, top_p, min_p).isfinite()
    threshold = keep_threshold(
        logits,
        torch.full((3,), top_k, dtype=torch.int32),
        torch.full((3,), top_p),
        torch.full((3,), min_p),
    )
    differs = (logits >= threshold[:, None]) != expected
    # Where a token stands on the very edge of a rule, rounding may decide either way.
    edge = _distance_to_edge(logits, top_k, top_p, min_p)
    assert not (differs & (edge > 1e-5)).any()


def _distance_to_edge(logits: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    kept = warped(logits, 1.0, top_k).double().softmax(-1)
    before = torch.stack([(kept * (kept > kept[:, i : i + 1])).sum(-1) for i in range(50)], dim=1)
    relative = kept / kept.amax(-1, keepdim=True)
    return torch.minimum((before - top_p).abs(), (relative - min_p).abs())


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (4000, 0.9), (3000, 1.0), (0, 0.3)])
def test_a_nucleus_beyond_the_first_candidates_is_exact(top_k: int, top_p: float) -> None:
    # Almost flat logits over a vocabulary larger than the number of candidates.
    logits = random_logits(2, 6000, scale=0.1)
    logits -= logits.amax(-1, keepdim=True)
    expected = warped(logits, 1.0, top_k, top_p).isfinite().sum(-1)
    threshold = keep_threshold(
        logits, torch.tensor([top_k, top_k]), torch.tensor([top_p, top_p]), torch.zeros(2)
    )
    kept = (logits >= threshold[:, None]).sum(-1)
    assert ((kept - expected).abs() <= 1).all()


def test_rows_with_and_without_filters_share_a_batch() -> None:
    logits = random_logits(4, 50)
    logits -= logits.amax(-1, keepdim=True)
    threshold = keep_threshold(
        logits,
        torch.tensor([0, 3, 50, 0]),
        torch.tensor([1.0, 1.0, 1.0, 0.5]),
        torch.zeros(4),
    )
    kept = (logits >= threshold[:, None]).sum(-1).tolist()
    assert kept[:3] == [50, 3, 50]
    assert 1 <= kept[3] < 50


def test_selecting_the_largest_top_k_is_as_good_as_sorting_rows() -> None:
    logits = random_logits(3, 50)
    logits -= logits.amax(-1, keepdim=True)
    top_k, top_p = torch.tensor([5, 20, 1]), torch.tensor([0.9, 0.6, 1.0])
    selected, is_exact = sorted_threshold(logits, top_k, top_p, 20)
    assert torch.equal(selected, sorted_threshold(logits, top_k, top_p, 50)[0])
    assert is_exact.all()


def test_tokens_that_tie_at_the_threshold_are_all_kept() -> None:
    logits = torch.tensor([[0.0, -1.0, -1.0, -1.0, -2.0]])
    for top_k, top_p in ((2, 1.0), (0, 0.6)):
        threshold = keep_threshold(
            logits, torch.tensor([top_k]), torch.tensor([top_p]), torch.zeros(1)
        )
        assert threshold.item() == -1.0


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy_without_overflow(temperature: float) -> None:
    logits = random_logits(50, VOCAB_SIZE, scale=50.0)
    expected = logits.argmax(-1)
    batch = make_batch(50, any_random=True, any_filter=True, temperature=temperature, top_p=0.9)
    assert torch.equal(sample(logits, batch).token_ids.long(), expected)


def test_a_huge_temperature_is_uniform() -> None:
    counts = draws(random_logits(1, VOCAB_SIZE), temperature=1e6)
    assert stats.chisquare(counts).pvalue > 1e-4
