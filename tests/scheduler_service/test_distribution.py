"""Histograms that take many observations at once and are exported more than once."""

import math

import pytest

from scheduler_service.telemetry.metrics.distribution import Distribution, HistogramView

LABELS = {"model_name": "tiny"}


def buckets(view: HistogramView) -> dict[float, float]:
    """Cumulative counts by upper bound."""
    (family,) = view.collect()
    return {
        float(sample.labels["le"]): sample.value
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }


def totals(view: HistogramView) -> dict[str, float]:
    (family,) = view.collect()
    return {
        sample.name.rpartition("_")[2]: sample.value
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_many_equal_observations_land_in_one_bucket_whose_bound_is_inclusive():
    distribution = Distribution()
    view = HistogramView(distribution, "latency_seconds", "Test.", LABELS, (0.001, 0.002, 0.005))
    distribution.observe(0.002, 3)
    distribution.observe(0.0021, 2)
    distribution.observe(1e9)
    assert buckets(view) == {0.001: 0, 0.002: 3, 0.005: 5, math.inf: 6}
    assert totals(view) == {"count": 6, "sum": pytest.approx(1e9 + 3 * 0.002 + 2 * 0.0021)}


def test_views_with_other_bounds_show_the_same_observations():
    distribution = Distribution()
    ours = HistogramView(distribution, "ours", "Test.", LABELS, (1.0, 2.0, 4.0))
    theirs = HistogramView(distribution, "theirs", "Test.", {**LABELS, "engine": "0"}, (1.0, 3.0))
    for value in (0.5, 1.0, 1.5, 2.5, 3.5, 9.0):
        distribution.observe(value)
    assert buckets(ours) == {1.0: 2, 2.0: 3, 4.0: 5, math.inf: 6}
    assert buckets(theirs) == {1.0: 2, 3.0: 4, math.inf: 6}
    assert totals(ours) == totals(theirs) == {"count": 6, "sum": 18.0}


def test_bounds_cannot_be_added_to_a_distribution_that_was_used():
    distribution = Distribution()
    distribution.observe(1.0)
    with pytest.raises(RuntimeError, match="before it is used"):
        distribution.refine((1.0,))


def test_a_bound_that_was_never_added_is_named():
    distribution = Distribution()
    distribution.refine((1.0,))
    with pytest.raises(ValueError, match=r"\[2.0\]"):
        distribution.cumulative((1.0, 2.0))
