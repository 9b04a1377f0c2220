"""The counter-based random numbers of `nanovllm_core.random`, bit for bit, on the device.

That module holds the definition and its sources; the constants are imported from it.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

from nanovllm_core import random as definition

_GOLDEN = tl.constexpr(definition.GOLDEN)
_MIX64_A = tl.constexpr(definition.MIX64_A)
_MIX64_B = tl.constexpr(definition.MIX64_B)
_MIX32_A = tl.constexpr(definition.MIX32_A)
_MIX32_B = tl.constexpr(definition.MIX32_B)
# The interpreter runs on a CPU and has no device library.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _wide(CONSTANT: tl.constexpr):
    return tl.full([], CONSTANT, dtype=tl.uint64)


@triton.jit
def _word(CONSTANT: tl.constexpr):
    return tl.full([], CONSTANT, dtype=tl.uint32)


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * _wide(_MIX64_A)
    z = (z ^ (z >> 27)) * _wide(_MIX64_B)
    return z ^ (z >> 31)


@triton.jit
def row_words(seed, position):
    """The two uint32 words that key a row; seed and position are int64 scalars."""
    golden = _wide(_GOLDEN)
    state = _mix64(seed.to(tl.uint64, bitcast=True) + golden)
    word = _mix64(state + (position + 1).to(tl.uint64, bitcast=True) * golden)
    return word.to(tl.uint32), (word >> 32).to(tl.uint32)


@triton.jit
def random_bits(low, high, index):
    """Uniform uint32 per vocabulary index (int32 tensor)."""
    bits = index.to(tl.uint32, bitcast=True) ^ low
    bits = (bits ^ (bits >> 16)) * _word(_MIX32_A)
    bits = ((bits ^ (bits >> 15)) + high) * _word(_MIX32_B)
    return bits ^ (bits >> 15)


@triton.jit
def _fast_log(x):
    """Natural logarithm from the hardware's log2: absolute error 2^-22, a few instructions."""
    if _INTERPRETED:
        return tl.log(x)
    else:
        return libdevice.fast_logf(x)


@triton.jit
def exponential_noise(low, high, index):
    """Standard exponential variables -log1p(-u), u = (bits + 0.5) * 2^-32, in float32.

    1 - u would lose the small u that decide races, so for u < 1/8 the series u + u^2/2 + ... is
    summed to u^7 (the next term is below 2^-23 relatively), and the logarithm serves above.
    Infinity where u rounds to 1.
    """
    u = (random_bits(low, high, index).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    series = 1.0 / 6.0 + u * (1.0 / 7.0)
    series = 1.0 / 5.0 + u * series
    series = 1.0 / 4.0 + u * series
    series = 1.0 / 3.0 + u * series
    series = 1.0 / 2.0 + u * series
    series = u * (1.0 + u * series)
    return tl.where(u < 0.125, series, -_fast_log(1.0 - u))


@triton.jit
def race_scores(logits, temperature, low, high, index):
    """Scores whose argmax is a draw from softmax(logits / temperature), or greedy at 0.

    The race argmax p / e over p = softmax(logits / T) is argmax logits / T - log e, for the
    normaliser does not change the order, and argmax logits - T log e, for neither does T > 0. The
    last form has no division that a small T could overflow.
    """
    noisy = logits - temperature * _fast_log(exponential_noise(low, high, index))
    # log e is infinite where u rounds to 1, and zero times infinity is no number.
    return tl.where(temperature > 0.0, noisy, logits)
