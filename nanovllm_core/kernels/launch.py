"""Launch configurations: every tuning constant of the kernels, in one place.

Choices depend on host-known shapes only, so that a captured CUDA graph always replays the launch it
was captured with. `*_CANDIDATES` are what `python -m benchmarks.kernels --sweep` tries; the tables
hold what is used.

On an H100 with torch 2.11 and Triton 3.6, entries for up to 64 rows won in whole decode steps
of Qwen3-0.6B (`benchmarks.tune_decode` and tries like it; K is 1024 to 3072 there), those of decode
attention above in batches of lengths as bench256 has them. On an H200 decode attention has a table
of its own, the rest is the same. Other entries were derived by counting:

- A 132-multiprocessor H100 needs about 16 KiB of loads in flight on each (3 TB/s times 600 ns of
  latency, by Little's law), better twice that; a block of a FMA kernel issues all its weight loads
  at once.
- Warps of a FMA block divide K between them, and summing up costs 5 shuffles per output, row and
  warp at one warp instruction a clock: with several rows few warps per block are better, as long
  as a thread's share of x (K / 32 / num_warps floats per row) fits its registers.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
import triton

from nanovllm_core.kernels.checks import KernelInputError

# Largest number of rows that the FMA kernels take: at 8 rows they need 50 of an SM's 128 FMAs a
# clock to keep up with memory, at 16 rows conversion and FMA together would be the limit.
MAX_GEMV_ROWS = 8

# Largest number of rows of the kernels that hold whole weight rows for the tensor cores.
MAX_RESIDENT_ROWS = 16

# Shared memory that a block of them may use for its operands where there is that much: sm_90 has
# 227 KiB, others have 163 or 99.
_MAX_RESIDENT_BYTES = 200 * 1024

# Least depth of a product on tensor cores with operands of 16 bits.
_MIN_DOT_K = 16

# Bytes of keys that decode attention may take in one step, by the size of their type. With them its
# blocks need 76 KiB of shared memory (compiled for sm_80); GPUs have 99 or more.
_MAX_KEY_BYTES = {2: 64 * 1024, 4: 32 * 1024}

# Largest number of rows of the LM head with sampling: its blocks keep all rows of x in registers
# while they walk the vocabulary, and 8 rows spill.
MAX_LM_HEAD_ROWS = 4

# Weight elements that one thread of a FMA kernel may hold: 128 bf16 elements are 64 registers.
_MAX_GEMV_ELEMENTS_PER_THREAD = 128


def cut_in_powers(k_size: int) -> tuple[int, int]:
    """K as two powers of two that hold it, the second of which may be 0: 3072 is 2048 and 1024.

    A single one would waste up to half of the registers that hold weights.
    """
    if k_size & (k_size - 1) == 0:
        return k_size, 0
    main = 1 << (k_size.bit_length() - 1)
    rest = triton.next_power_of_2(k_size - main)
    return (main, rest) if rest < main else (2 * main, 0)


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """FMA kernel: a block multiplies `block_n` whole rows of the weight with every row of x."""

    block_n: int
    num_warps: int

    def fitted_block_n(self, k_padded: int) -> int:
        """block_n, halved until the block's weights fit into registers; a power of two."""
        block_n = self.block_n
        budget = _MAX_GEMV_ELEMENTS_PER_THREAD * 32 * self.num_warps
        while block_n > 1 and block_n * k_padded > budget:
            block_n //= 2
        return block_n

    def options(self, dependent: bool) -> dict[str, object]:
        return launch_options(self.num_warps, 1, dependent)


@dataclass(frozen=True, slots=True)
class ResidentConfig:
    """Tensor-core kernel for up to MAX_RESIDENT_ROWS rows: a block holds 16 whole weight rows.

    All of them are loaded before the block waits for the kernel in front. K is cut into `groups`
    products of their own, one after another for each warp, whose sums are added up at the end.
    """

    groups: int
    num_warps: int
    # Largest K for which a thread's share of the weights fits its registers.
    max_k: int = 1 << 31

    #: Weight rows of a block: the height of a tensor core's tile.
    BLOCK_N: ClassVar[int] = 16

    def options(self, dependent: bool) -> dict[str, object]:
        return launch_options(self.num_warps, 1, dependent)

    def fits(self, rows: int, k_size: int, itemsize: int) -> bool:
        """Whether a block can hold its operands, and tensor cores take them."""
        k_main, k_rest = cut_in_powers(k_size)
        num_bytes = (self.BLOCK_N + _padded_rows(rows)) * (k_main + k_rest) * itemsize
        least = _MIN_DOT_K * self.groups
        return (
            rows <= MAX_RESIDENT_ROWS
            and itemsize == 2
            and k_main + k_rest <= self.max_k
            and num_bytes <= _max_resident_bytes()
            and k_main >= least
            and (k_rest == 0 or k_rest >= least)
        )

    def shape(self, rows: int, k_size: int) -> dict[str, int]:
        """The kernels' constants for this many rows of x and columns of the weight.

        Raises:
            KernelInputError: there are more than MAX_RESIDENT_ROWS rows.
        """
        if rows > MAX_RESIDENT_ROWS:
            raise KernelInputError(
                f"a ResidentConfig takes up to {MAX_RESIDENT_ROWS} rows, got {rows}"
            )
        k_main, k_rest = cut_in_powers(k_size)
        return {
            "K": k_size,
            "GROUPS": self.groups,
            "GROUP_K": k_main // self.groups,
            "GROUP_K_REST": k_rest // self.groups,
            "ROWS": rows,
            "ROWS_PADDED": _padded_rows(rows),
            "BLOCK_N": self.BLOCK_N,
        }


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tensor-core kernel over [block_m, block_n] output tiles.

    split_k blocks share one tile and each sums its part of K. group_m row tiles are walked before
    the next column tile, so that weights are reused from the L2 cache at prefill sizes.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1
    group_m: int = 8

    def options(self, dependent: bool) -> dict[str, object]:
        return launch_options(self.num_warps, self.num_stages, dependent)


@functools.cache
def _max_resident_bytes() -> int:
    """Shared memory that a block may use for its operands on this machine's GPU."""
    if not torch.cuda.is_available():
        return _MAX_RESIDENT_BYTES
    properties = torch.cuda.get_device_properties(torch.device("cuda"))
    # Not every build of PyTorch says.
    limit: int = getattr(properties, "shared_memory_per_block_optin", _MAX_RESIDENT_BYTES)
    return min(_MAX_RESIDENT_BYTES, limit)


def _padded_rows(rows: int) -> int:
    """Rows of x that a tensor core's tile takes."""
    return 8 if rows <= 8 else MAX_RESIDENT_ROWS


LinearConfig = GemvConfig | ResidentConfig | TileConfig


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """Paged decode attention: blocks walk `block_kv` tokens a step.

    The context is split until about `target_blocks` blocks exist, at most max_splits ways. With
    `early_tile`, a block loads its first step before it waits for the kernel in front.
    """

    block_kv: int
    num_warps: int
    num_stages: int
    target_blocks: int
    max_splits: int
    early_tile: bool = False

    def num_splits(self, num_seqs: int, num_kv_heads: int) -> int:
        """A power of two between 1 and max_splits."""
        splits = 1
        while splits < self.max_splits and splits * num_seqs * num_kv_heads < self.target_blocks:
            splits *= 2
        return min(splits, self.max_splits)

    def fitted(self, block_d: int, itemsize: int) -> "DecodeConfig":
        """With shorter steps and fewer warps, if keys of a step take more than they may."""
        block_kv, num_warps = self.block_kv, self.num_warps
        while block_kv > 16 and block_kv * block_d * itemsize > _MAX_KEY_BYTES[itemsize]:
            block_kv, num_warps = block_kv // 2, max(1, num_warps // 2)
        return replace(self, block_kv=block_kv, num_warps=num_warps)

    def options(self, dependent: bool) -> dict[str, object]:
        return launch_options(self.num_warps, self.num_stages, dependent)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """Paged prefill attention: [block_m, block_kv] score tiles; rows are (token, head of group)."""

    block_m: int
    block_kv: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, object]:
        return launch_options(self.num_warps, self.num_stages, False)


@dataclass(frozen=True, slots=True)
class LmHeadConfig:
    """LM head with sampling: a block walks blocks_per_program groups of block_n vocabulary rows."""

    block_n: int
    blocks_per_program: int
    num_warps: int

    def options(self, dependent: bool) -> dict[str, object]:
        return launch_options(self.num_warps, 1, dependent)


def gate_up_holds_back(rows: int) -> bool:
    """Whether of a layer's kernels gate-up lets the next one start only after its own wait.

    Otherwise decode attention does. One of them has to, see `device`; which is faster was measured
    in whole steps.
    """
    return rows == 1


Table = Sequence[tuple[int, LinearConfig]]
DecodeTable = Sequence[tuple[int, DecodeConfig]]
_Config = TypeVar("_Config", bound=LinearConfig)


def launch_options(num_warps: int, num_stages: int, dependent: bool) -> dict[str, object]:
    """Triton's launch keywords; dependent asks for a programmatic dependent launch."""
    options: dict[str, object] = {"num_warps": num_warps, "num_stages": num_stages}
    if dependent:
        options["launch_pdl"] = True
    return options


@functools.cache
def _gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def decode_table() -> DecodeTable:
    """PAGED_DECODE as it is on this machine's GPU."""
    name = _gpu_name()
    return next((table for gpu, table in PAGED_DECODE_ON.items() if gpu in name), PAGED_DECODE)


def choose_decode(num_seqs: int) -> DecodeConfig:
    """The entry of `decode_table` that holds `num_seqs`."""
    return next(config for max_seqs, config in decode_table() if num_seqs <= max_seqs)


def choose(table: Sequence[tuple[int, _Config]], rows: int, k_size: int, itemsize: int) -> _Config:
    """The first entry whose row limit holds `rows` and whose blocks can hold K columns of the type.

    The last entry holds anything.
    """
    for max_rows, config in table:
        if rows <= max_rows and (
            not isinstance(config, ResidentConfig) or config.fits(rows, k_size, itemsize)
        ):
            return config
    return table[-1][1]


# (rows up to, configuration)
RMS_NORM_LINEAR: Table = (
    (1, ResidentConfig(groups=8, num_warps=4, max_k=2048)),
    (1, GemvConfig(block_n=4, num_warps=1)),
    (8, ResidentConfig(groups=4, num_warps=4, max_k=2048)),
    (MAX_RESIDENT_ROWS, ResidentConfig(groups=8, num_warps=4, max_k=2048)),
    (MAX_RESIDENT_ROWS, ResidentConfig(groups=16, num_warps=16)),
    (16, TileConfig(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4)),
    (32, TileConfig(block_m=32, block_n=32, block_k=128, num_warps=4, num_stages=4)),
    (64, TileConfig(block_m=64, block_n=32, block_k=128, num_warps=4, num_stages=6)),
    (256, TileConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4)),
    (1 << 31, TileConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)),
)

# block_n counts output columns; each needs a gate row and an up row of the weight.
SILU_MUL_LINEAR: Table = (
    (2, ResidentConfig(groups=4, num_warps=4, max_k=2048)),
    (1, GemvConfig(block_n=8, num_warps=8)),
    (MAX_RESIDENT_ROWS, ResidentConfig(groups=8, num_warps=4, max_k=2048)),
    (MAX_RESIDENT_ROWS, ResidentConfig(groups=16, num_warps=16)),
    (16, TileConfig(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=3)),
    (32, TileConfig(block_m=32, block_n=32, block_k=128, num_warps=4, num_stages=3)),
    (64, TileConfig(block_m=64, block_n=32, block_k=128, num_warps=8, num_stages=4)),
    (256, TileConfig(block_m=64, block_n=32, block_k=64, num_warps=4, num_stages=4)),
    (1 << 31, TileConfig(block_m=128, block_n=64, block_k=64, num_warps=8, num_stages=3)),
)

# N is the hidden size, so tiles are few: the FMA kernel takes few rows of the weight per block and
# the tensor-core kernel splits K.
LINEAR_RESIDUAL: Table = (
    (1, GemvConfig(block_n=4, num_warps=2)),
    (MAX_RESIDENT_ROWS, ResidentConfig(groups=8, num_warps=8, max_k=4096)),
    (4, GemvConfig(block_n=4, num_warps=4)),
    (16, TileConfig(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4, split_k=8)),
    (32, TileConfig(block_m=32, block_n=16, block_k=256, num_warps=4, num_stages=3, split_k=4)),
    (64, TileConfig(block_m=64, block_n=16, block_k=128, num_warps=4, num_stages=4, split_k=4)),
    (256, TileConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=4, split_k=2)),
    (1 << 31, TileConfig(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3)),
)

# (sequences up to, configuration). Few sequences want small tiles: the context is spread over
# many multiprocessors, and the splits do not outnumber the tiles of a short one.
PAGED_DECODE: DecodeTable = (
    (1, DecodeConfig(32, 1, num_stages=1, target_blocks=256, max_splits=32, early_tile=True)),
    (4, DecodeConfig(256, 8, num_stages=1, target_blocks=128, max_splits=32, early_tile=True)),
    (8, DecodeConfig(128, 4, num_stages=1, target_blocks=512, max_splits=64, early_tile=True)),
    (16, DecodeConfig(32, 1, num_stages=3, target_blocks=1024, max_splits=64, early_tile=True)),
    (64, DecodeConfig(32, num_warps=1, num_stages=3, target_blocks=512, max_splits=8)),
    (96, DecodeConfig(32, num_warps=1, num_stages=3, target_blocks=1024, max_splits=2)),
    (1 << 31, DecodeConfig(64, num_warps=2, num_stages=2, target_blocks=1, max_splits=1)),
)
# In place of PAGED_DECODE, by a part of the GPU's name. An H200 reads its memory 1.4 times as fast
# as an H100: fewer splits pay for few sequences, smaller steps for many.
PAGED_DECODE_ON: dict[str, DecodeTable] = {
    "H200": (
        PAGED_DECODE[0],
        (2, DecodeConfig(256, 8, num_stages=1, target_blocks=64, max_splits=32, early_tile=True)),
        (8, DecodeConfig(256, 8, num_stages=1, target_blocks=128, max_splits=32, early_tile=True)),
        (16, DecodeConfig(32, 1, num_stages=3, target_blocks=1024, max_splits=64, early_tile=True)),
        (64, DecodeConfig(32, num_warps=1, num_stages=3, target_blocks=512, max_splits=8)),
        (80, DecodeConfig(64, num_warps=2, num_stages=2, target_blocks=1024, max_splits=2)),
        (96, DecodeConfig(32, num_warps=1, num_stages=3, target_blocks=1024, max_splits=2)),
        (160, DecodeConfig(64, num_warps=2, num_stages=2, target_blocks=1, max_splits=1)),
        (1 << 31, DecodeConfig(32, num_warps=1, num_stages=3, target_blocks=1, max_splits=1)),
    ),
}
PAGED_PREFILL = PrefillConfig(block_m=128, block_kv=64, num_warps=8, num_stages=3)
# One or two rows; three to MAX_LM_HEAD_ROWS.
LM_HEAD_SAMPLE = LmHeadConfig(block_n=16, blocks_per_program=4, num_warps=4)
LM_HEAD_SAMPLE_ROWS = LmHeadConfig(block_n=8, blocks_per_program=8, num_warps=2)

GEMV_CANDIDATES: tuple[GemvConfig, ...] = tuple(
    GemvConfig(block_n, num_warps)
    for num_warps, sizes in ((1, (1, 2, 4)), (2, (2, 4, 8)), (4, (2, 4, 8, 16)), (8, (8, 16)))
    for block_n in sizes
)


RESIDENT_CANDIDATES: tuple[ResidentConfig, ...] = tuple(
    ResidentConfig(groups, num_warps)
    for groups, num_warps in ((4, 4), (8, 4), (8, 8), (16, 8), (16, 16), (32, 16))
)


def tile_candidates(rows: int, *, columns_per_output: int, split: bool) -> tuple[TileConfig, ...]:
    """Tensor-core configurations worth trying for a row count.

    Args:
        rows: rows of x.
        columns_per_output: weight rows behind one output column (2 for gate and up).
        split: whether the kernel can split K.
    """
    if rows > 256:
        shapes = ((128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 4))
        return tuple(
            TileConfig(m, n // columns_per_output, k, warps, stages)
            for m, n, k, warps, stages in shapes
        )
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return tuple(
        TileConfig(block_m, n // columns_per_output, k, 4, stages, split_k)
        for n, k, stages in ((16, 256, 3), (32, 128, 4), (32, 128, 6), (64, 64, 5), (64, 128, 3))
        for split_k in ((1, 2, 4, 8) if split else (1,))
    )


PAGED_DECODE_CANDIDATES: tuple[DecodeConfig, ...] = tuple(
    DecodeConfig(block_kv, num_warps, num_stages, target_blocks, max_splits=target_blocks // 8)
    for block_kv, num_warps, num_stages in (
        (16, 1, 3),
        (32, 2, 3),
        (32, 4, 5),
        (64, 4, 3),
        (64, 4, 5),
        (128, 4, 3),
    )
    for target_blocks in (64, 128, 256, 512)
)
PAGED_PREFILL_CANDIDATES: tuple[PrefillConfig, ...] = (
    PrefillConfig(64, 64, 4, 3),
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 128, 8, 2),
)
LM_HEAD_CANDIDATES: tuple[LmHeadConfig, ...] = tuple(
    LmHeadConfig(block_n, blocks_per_program, num_warps)
    for block_n, num_warps in ((4, 1), (8, 1), (8, 2), (16, 2), (8, 4), (16, 4), (32, 8))
    for blocks_per_program in (2, 8)
)
