"""Counter-based random numbers: a pure function of (seed, position, index).

A sequence's random numbers do not depend on what else is in the batch, in which row it stands, or
on whether it was preempted or moved to another process: the draw for the token at `position` of a
sequence with `seed` uses one 32-bit value per vocabulary index and nothing else. The arithmetic is
wrapping integer arithmetic only, so that every device, and the Triton kernels, agree bit for bit.

The hash, all operations modulo 2^64 or 2^32:

    state        = mix64(seed + GOLDEN)
    word         = mix64(state + (position + 1) * GOLDEN)
    low, high    = word mod 2^32, word div 2^32
    bits[index]  = step2(step1(index xor low) + high)

    mix64(z):  z = (z xor z>>30) * MIX64_A;  z = (z xor z>>27) * MIX64_B;  z xor z>>31
    step1(x):  x = (x xor x>>16) * MIX32_A;  x xor x>>15
    step2(x):  x = x * MIX32_B;  x xor x>>15

mix64 is the finaliser of SplitMix64, and GOLDEN its increment (Steele, Lea, Flood: Fast Splittable
Pseudorandom Number Generators, OOPSLA 2014, with Stafford's variant 13 of the constants). step2 of
step1 without `high` is the 32-bit finaliser of least known bias with two multiplications from
C. Wellons's hash-prospector (16 21f0aaad 15 d35a2d97 15). `high` enters between its rounds so that
two rows whose `low` agree in most bits are not permutations of each other.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX64_A = 0xBF58476D1CE4E5B9
MIX64_B = 0x94D049BB133111EB
MIX32_A = 0x21F0AAAD
MIX32_B = 0xD35A2D97


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned constant: torch's scalars are signed."""
    return value - (1 << bits) if value >> (bits - 1) else value


_GOLDEN = _signed(GOLDEN, 64)
_MIX64_A = _signed(MIX64_A, 64)
_MIX64_B = _signed(MIX64_B, 64)
_MIX32_A = _signed(MIX32_A, 32)
_MIX32_B = _signed(MIX32_B, 32)


def _shift64(value: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask makes the shift logical.
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _xor_shift32_(value: Tensor, bits: int) -> Tensor:
    return value.bitwise_xor_((value >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _mix64(value: Tensor) -> Tensor:
    value = (value ^ _shift64(value, 30)) * _MIX64_A
    value = (value ^ _shift64(value, 27)) * _MIX64_B
    return value ^ _shift64(value, 31)


def row_words(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The two 32-bit words that key a row's random numbers.

    Args:
        seeds: [rows] int64.
        positions: [rows] int64, index of the token to draw within its sequence.

    Returns:
        low and high, each [rows] int32 (the bit patterns; read them as unsigned).
    """
    state = _mix64(seeds + _GOLDEN)
    word = _mix64(state + (positions + 1) * _GOLDEN)
    # A view rather than a conversion: what a narrowing conversion does with large values is not
    # specified. Both supported kinds of machine are little-endian.
    low, high = word.view(torch.int32).view(-1, 2).unbind(1)
    return low, high


def random_bits(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """One uniform 32-bit value per row and vocabulary index.

    Args:
        seeds: [rows] int64.
        positions: [rows] int64.
        vocab_size: number of values per row.

    Returns:
        [rows, vocab_size] int32 bit patterns, uniform over all 2^32 of them.
    """
    low, high = row_words(seeds, positions)
    index = torch.arange(vocab_size, dtype=torch.int32, device=seeds.device)
    bits = index ^ low[:, None]
    _xor_shift32_(bits, 16).mul_(_MIX32_A)
    _xor_shift32_(bits, 15).add_(high[:, None])
    return _xor_shift32_(bits.mul_(_MIX32_B), 15)


def exponential_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Independent standard exponential variables, for exponential races.

    The index that maximises p[i] / e[i] is distributed as p. The race is decided by small e, so
    e = -log1p(-u) with u = (bits + 0.5) * 2^-32 is used: u is then resolved finely near 0, where
    -log(u) would be resolved finely near 1.

    Args:
        seeds: [rows] int64.
        positions: [rows] int64.
        vocab_size: number of values per row.

    Returns:
        [rows, vocab_size] float32, positive; infinity where u rounds to 1.
    """
    bits = random_bits(seeds, positions, vocab_size).view(torch.uint32)
    uniform = bits.to(torch.float32).add_(0.5).mul_(2.0**-32)
    return uniform.neg_().log1p_().neg_()
