"""Thresholds of top_k and top_p from whole rows: rows that are hard to search, and mixed calls."""

import pytest
import torch

from nanovllm_core.kernels import row_threshold
from nanovllm_core.kernels.filter_threshold import (
    filter_thresholds,
    filter_thresholds_reference,
)

# Two blocks, the last of 907 logits.
VOCAB = 5003
TINY, HUGE = 1e-38, 1e30
MASKED = float("-inf")


def normal_row():
    return 3 * torch.randn(VOCAB)


def flat_row():
    """Distinct logits within a thousandth, as far as float32 has so many."""
    return 5 + 1e-3 * torch.rand(VOCAB)


def peaked_row():
    row = torch.randn(VOCAB)
    row[4500] = 60.0
    return row


def cluster_row():
    """A peak far above logits that are nearly one: edges between them fall on neither."""
    row = torch.rand(VOCAB) * 1e-4
    row[4096] = 9.0
    return row


def tied_row():
    """Logits of few values, like those of a bfloat16 output matrix."""
    return (4 * torch.randn(VOCAB)).to(torch.bfloat16).float().mul(2).round().div(2)


def two_values_row():
    row = torch.full((VOCAB,), -2.5)
    row[[0, 4095, 4096, 5002]] = 1.0
    return row


def masked_row():
    row = torch.full((VOCAB,), MASKED)
    row[torch.randperm(VOCAB)[:90]] = torch.randn(90)
    return row


def masked_by_a_number_row():
    row = normal_row()
    row[torch.rand(VOCAB) < 0.9] = torch.finfo(torch.float32).min
    return row


def positive_row():
    return 40 + 2 * torch.randn(VOCAB).abs()


def negative_row():
    return -1e4 - 300 * torch.rand(VOCAB)


def increasing_row():
    """All of a filter's edge in one block."""
    return torch.linspace(-8, 8, VOCAB)


TOP_P = (1.0, 0, 0.95, 0.0)
SMALL_TOP_P = (0.7, 0, 1e-6, 0.0)
LARGE_TOP_P = (1.3, 0, 0.999999, 0.0)
TOP_K = (1.0, 200, 1.0, 0.0)
BOTH = (0.6, 1000, 0.9, 0.0)
ALL = (1.5, 2500, 0.999, 0.05)
COLD = (TINY, 100, 0.5, 0.0)
EQUAL_MASSES = (HUGE, 0, 0.5, 0.0)
BOTH_OF_EQUAL_MASSES = (HUGE, 3001, 0.25, 0.0)
MIN_P = (1.0, 0, 1.0, 0.2)
GREEDY = (0.0, 100, 0.5, 0.5)
OFF = (1.0, VOCAB, 1.0, 0.0)

CASES = [
    (normal_row, [TOP_P, SMALL_TOP_P, LARGE_TOP_P, TOP_K, BOTH, ALL, MIN_P, GREEDY, OFF]),
    (flat_row, [TOP_P, BOTH]),
    (peaked_row, [TOP_P, BOTH]),
    (cluster_row, [(1.0, 0, 0.7, 0.0), TOP_K]),
    (tied_row, [TOP_P, BOTH]),
    (two_values_row, [(1.0, 0, 0.9, 0.0), (1.0, 4, 0.9, 0.0), TOP_K]),
    (masked_row, [BOTH, (1.0, 70, 0.9, 0.0)]),
    (masked_by_a_number_row, [TOP_K, LARGE_TOP_P]),
    (positive_row, [EQUAL_MASSES, BOTH_OF_EQUAL_MASSES]),
    (negative_row, [COLD, (100.0, 0, 0.8, 0.0)]),
    (increasing_row, [TOP_P]),
]


def filter_columns(filters, device):
    temperature, top_k, top_p, min_p = torch.tensor(filters, dtype=torch.float64).unbind(1)
    return (
        temperature.float().to(device),
        top_k.to(device, torch.int32),
        top_p.float().to(device),
        min_p.float().to(device),
    )


def assert_filtered(logits, columns, threshold):
    """What a threshold keeps is what sorting keeps, but for masses that rounding cannot tell."""
    expected = filter_thresholds_reference(logits, *columns)
    for row, (warmth, _, p, m) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        values, found = logits[row].double(), threshold[row].double()
        exact = expected[row]
        if torch.equal(values >= found, values >= exact):
            continue
        has_top_p = warmth > 0 and p < 1 and m == 0
        assert has_top_p, f"row {row}: {found} instead of {exact}"
        masses = ((values - values.max()) / warmth).exp()
        between = (values >= min(found, exact)) & (values < max(found, exact))
        assert masses[between].sum() < 1e-6 * masses.sum(), f"row {row}: {found}, not {exact}"


@pytest.mark.parametrize(("make_row", "filters"), CASES)
def test_filters_keep_what_sorting_keeps(make_row, filters, device):
    columns = filter_columns(filters, device)
    logits = make_row().to(device).repeat(len(filters), 1)
    threshold = filter_thresholds(logits, *columns)
    assert_filtered(logits, columns, threshold)
    keeps_all = torch.tensor([f in (GREEDY, OFF) for f in filters], device=device)
    assert torch.equal(threshold == MASKED, keeps_all)


def test_filters_that_keep_masked_logits_keep_all(device):
    """top_k of more logits than are not masked keeps them all; top_p keeps none of mass 0."""
    logits = torch.full((3, VOCAB), MASKED, device=device)
    logits[:2, 40:60] = torch.arange(20.0, device=device)
    columns = filter_columns([TOP_K, (HUGE, 200, 0.5, 0.0), BOTH], device)
    assert filter_thresholds(logits, *columns).tolist() == [MASKED, 10.0, MASKED]


def test_lists_that_overflow_give_way_to_the_row(device, monkeypatch):
    columns = filter_columns([BOTH, EQUAL_MASSES], device)
    logits = flat_row().to(device).repeat(2, 1)
    listed = filter_thresholds(logits, *columns)
    monkeypatch.setattr(row_threshold, "_LIST_SIZE", 8)
    assert torch.equal(filter_thresholds(logits, *columns), listed)
    assert_filtered(logits, columns, listed)


def test_a_row_depends_neither_on_the_others_nor_on_its_place(device):
    filters = [TOP_P, GREEDY, BOTH]
    columns = filter_columns(filters, device)
    logits = torch.stack([flat_row(), peaked_row(), normal_row()]).to(device)
    threshold = filter_thresholds(logits, *columns)
    alone = [
        filter_thresholds(logits[row : row + 1], *filter_columns([f], device))
        for row, f in reversed(list(enumerate(filters)))
    ]
    assert torch.equal(torch.cat(alone).flip(0), threshold)


def test_logits_that_no_round_separates_are_told_apart(device):
    """Pairs so close that a bracket holds both: either may be the threshold, or an edge's."""
    pairs = torch.arange(20.0, device=device)[:, None] - torch.tensor([0.0, 1e-4], device=device)
    one_each = [(1.0, k, 1.0, 0.0) for k in (5, 6, 39)]
    equal_masses = [(HUGE, 0, (k - 0.5) / 40, 0.0) for k in (5, 6, 39)]
    columns = filter_columns(one_each + equal_masses, device)
    threshold = filter_thresholds(pairs.reshape(1, 40).repeat(6, 1), *columns)
    ordered = pairs.flatten().sort(descending=True).values
    assert torch.equal(threshold, ordered[[4, 5, 38, 4, 5, 38]])


def test_an_edge_with_exactly_enough_belongs_to_the_set(device):
    """top_k and top_p end at a gap in which there are edges: all of them have just enough."""
    row = torch.cat([torch.linspace(-9, -8, 60), torch.linspace(8, 8.01, 70)]).to(device)
    columns = filter_columns(
        [(1.0, 70, 1.0, 0.0), (HUGE, 100, 0.7, 0.0), (HUGE, 70, 0.01, 0.0)], device
    )
    threshold = filter_thresholds(row.repeat(3, 1), *columns)
    assert torch.equal(threshold, row[[60, 60, 129]])
