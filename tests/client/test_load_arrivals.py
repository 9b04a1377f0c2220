"""When the requests of an open loop are due."""

import statistics
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.load.arrivals import Arrivals, arrival_times


def gaps(kind: Arrivals, rate: float, **options) -> list[float]:
    times = arrival_times(kind, 20_001, rate=rate, seed=3, **options)
    return [later - earlier for earlier, later in pairwise(times)]


def variation(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(Arrivals),
    count=st.integers(0, 50),
    rate=st.floats(0.01, 1000),
    seed=st.integers(),
    burstiness=st.floats(0.05, 20),
)
def test_arrivals_begin_at_zero_and_never_go_back(kind, count, rate, seed, burstiness):
    times = arrival_times(kind, count, rate=rate, seed=seed, burstiness=burstiness)
    assert len(times) == count
    assert times == sorted(times)
    assert times[:1] == [0.0][:count]
    assert times == arrival_times(kind, count, rate=rate, seed=seed, burstiness=burstiness)


@pytest.mark.parametrize("kind", Arrivals)
def test_every_process_has_the_rate_that_was_asked_for(kind):
    assert 1 / statistics.fmean(gaps(kind, 40.0)) == pytest.approx(40.0, rel=0.06)


def test_uniform_gaps_are_equal():
    assert arrival_times(Arrivals.UNIFORM, 4, rate=4.0, seed=0) == [0.0, 0.25, 0.5, 0.75]


def test_poisson_gaps_vary_as_much_as_their_mean():
    assert variation(gaps(Arrivals.POISSON, 10.0)) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(("burstiness", "expected"), [(0.25, 2.0), (1.0, 1.0), (4.0, 0.5)])
def test_burstiness_is_the_shape_of_the_gamma_distribution(burstiness, expected):
    found = variation(gaps(Arrivals.BURSTY, 10.0, burstiness=burstiness))
    assert found == pytest.approx(expected, rel=0.08)


def test_another_seed_gives_other_times():
    first, second = (arrival_times(Arrivals.POISSON, 9, rate=1.0, seed=seed) for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 1.0, "burstiness": 0.0}])
def test_numbers_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="must be above 0"):
        arrival_times(Arrivals.BURSTY, 3, seed=0, **options)
