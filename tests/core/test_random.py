import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nanovllm_core.random import (
    GOLDEN,
    MIX32_A,
    MIX32_B,
    MIX64_A,
    MIX64_B,
    exponential_noise,
    random_bits,
)

INT64 = st.integers(-(2**63), 2**63 - 1)


def unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.numpy().view(np.uint32)


def reference(seed: int, position: int, index: int) -> int:
    """The formula of the module's docstring in unbounded integers."""
    mask64, mask32 = 2**64 - 1, 2**32 - 1

    def mix64(z: int) -> int:
        z = (z ^ z >> 30) * MIX64_A & mask64
        z = (z ^ z >> 27) * MIX64_B & mask64
        return z ^ z >> 31

    state = mix64(seed + GOLDEN & mask64)
    word = mix64(state + (position + 1) * GOLDEN & mask64)
    low, high = word & mask32, word >> 32
    x = index ^ low
    x = (x ^ x >> 16) * MIX32_A & mask32
    x = (x ^ x >> 15) + high & mask32
    x = x * MIX32_B & mask32
    return x ^ x >> 15


@given(seed=INT64, position=st.integers(0, 2**31 - 1), index=st.integers(0, 299))
@settings(max_examples=200, deadline=None)
def test_bits_follow_the_documented_formula(seed: int, position: int, index: int) -> None:
    bits = random_bits(torch.tensor([seed]), torch.tensor([position]), 300)
    assert int(unsigned(bits)[0, index]) == reference(seed, position, index)


def test_splitmix64_is_the_published_one() -> None:
    # The first outputs of SplitMix64 with state 1234567, as Rosetta Code lists them.
    state, outputs = 1234567, []
    for _ in range(3):
        state = state + GOLDEN & 2**64 - 1
        z = (state ^ state >> 30) * MIX64_A & 2**64 - 1
        z = (z ^ z >> 27) * MIX64_B & 2**64 - 1
        outputs.append(z ^ z >> 31)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_rows_do_not_depend_on_the_batch() -> None:
    seeds, positions = torch.arange(50), torch.arange(50) * 3
    together = random_bits(seeds, positions, 100)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random_bits(seeds[order], positions[order], 100), together[order])
    assert torch.equal(random_bits(seeds[7:8], positions[7:8], 100), together[7:8])


def test_a_smaller_vocabulary_is_a_prefix() -> None:
    key = torch.tensor([3]), torch.tensor([4])
    assert torch.equal(random_bits(*key, 10), random_bits(*key, 100)[:, :10])


@pytest.mark.parametrize("varied", ["seeds", "positions", "indices"])
def test_bits_are_uniform_along_each_coordinate(varied: str) -> None:
    count = 1 << 16
    if varied == "indices":
        bits = random_bits(torch.tensor([0]), torch.tensor([0]), count)
    else:
        counter, fixed = torch.arange(count), torch.zeros(count, dtype=torch.int64)
        seeds, positions = (counter, fixed) if varied == "seeds" else (fixed, counter)
        bits = random_bits(seeds, positions, 1)
    values = unsigned(bits).ravel()
    for shift in (0, 8, 16, 24):
        observed = np.bincount(values >> shift & 255, minlength=256)
        assert stats.chisquare(observed).pvalue > 1e-4
    assert stats.kstest(values / 2**32, "uniform").pvalue > 1e-4


def test_neighbouring_keys_and_indices_are_uncorrelated() -> None:
    seeds = torch.arange(64).repeat_interleave(64)
    positions = torch.arange(64).repeat(64)
    values = unsigned(random_bits(seeds, positions, 256)).reshape(64, 64, 256) / 2**32 - 0.5
    for axis in range(3):
        ahead = np.take(values, range(1, values.shape[axis]), axis=axis)
        behind = np.take(values, range(values.shape[axis] - 1), axis=axis)
        # 1/12 is the variance; the mean of n products scatters by 1 / (12 sqrt(n)).
        correlation = (ahead * behind).mean() * 12
        assert abs(correlation) < 5 / np.sqrt(ahead.size)


def test_rows_are_not_permutations_of_one_another() -> None:
    values = unsigned(random_bits(torch.arange(200), torch.zeros(200, dtype=torch.int64), 4096))
    # 200 * 4096 draws from 2^32 values collide about 78 times; rows that were made of one sequence
    # in another order would collide in thousands.
    assert values.size - np.unique(values).size < 150


def test_noise_is_standard_exponential_and_positive() -> None:
    noise = exponential_noise(torch.arange(100), torch.arange(100), 1000).numpy().ravel()
    assert noise.min() > 0
    assert stats.kstest(noise.astype(np.float64), "expon").pvalue > 1e-4
    # The smallest of 100,000 draws is about 1e-5: small values decide races and must be resolved.
    assert np.unique(noise[noise < 1e-3]).size == (noise < 1e-3).sum()
