"""Both ends of a decode iteration on the device: collect the slots' inputs, append their tokens.

Unfused, these are some forty launches of tiny gather and scatter kernels, which at one sequence
would cost as much as ten layers. Slot state stays where it is; only what the layers read is copied
into dense rows, one row per batch position.

    gather   position = num_computed[slot];  runs = active[slot] and position < capacity[slot]
             hidden = embedding[token_ids[slot, position]];  slot_mapping, context_lens, block table
    append   token_ids[slot, num_tokens[slot]] = token;  finish flag from stop tokens and length

Rows that do not run write to the trash slot of the cache, see no context, and change nothing.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels.checks import require_dtype, require_row_values
from nanovllm_core.kernels.device import start_dependents
from nanovllm_core.kernels.launch import launch_options

FINISH_NONE = tl.constexpr(0)
FINISH_STOP_TOKEN = tl.constexpr(1)
FINISH_LENGTH = tl.constexpr(2)
FINISH_NOT_RUN = tl.constexpr(3)


@dataclass(frozen=True, slots=True)
class SlotTensors:
    """Views of the slot state, one row per slot. Integers are columns of one int64 table."""

    token_ids: Tensor  # [num_slots, max_len] int32
    block_tables: Tensor  # [num_slots, max_blocks] int32
    stop_token_ids: Tensor  # [num_slots, max_stop] int32, padded with -1
    num_tokens: Tensor  # [num_slots] int64, strided, like those below
    num_computed: Tensor
    max_total_tokens: Tensor
    capacity: Tensor
    active: Tensor
    seed: Tensor
    top_k: Tensor
    temperature: Tensor  # [num_slots] float32, strided, like those below
    top_p: Tensor
    min_p: Tensor


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What the layers and the sampler read: dense rows of one batch."""

    hidden: Tensor  # [rows, hidden_size], the embedded tokens
    positions: Tensor  # [rows] int64
    slot_mapping: Tensor  # [rows] int64
    block_tables: Tensor  # [rows, max_blocks] int32
    context_lens: Tensor  # [rows] int32; 0 in rows that do not run
    seeds: Tensor  # [rows] int64
    draw_positions: Tensor  # [rows] int64, index that the new token will have
    top_k: Tensor  # [rows] int32
    temperature: Tensor  # [rows] float32
    top_p: Tensor  # [rows] float32
    min_p: Tensor  # [rows] float32

    @classmethod
    def allocate(
        cls, rows: int, hidden_size: int, max_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> "DecodeInputs":
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            hidden=empty(rows, hidden_size, dtype=dtype),
            positions=empty(rows, dtype=torch.int64),
            slot_mapping=empty(rows, dtype=torch.int64),
            block_tables=empty(rows, max_blocks, dtype=torch.int32),
            context_lens=empty(rows, dtype=torch.int32),
            seeds=empty(rows, dtype=torch.int64),
            draw_positions=empty(rows, dtype=torch.int64),
            top_k=empty(rows, dtype=torch.int32),
            temperature=empty(rows, dtype=torch.float32),
            top_p=empty(rows, dtype=torch.float32),
            min_p=empty(rows, dtype=torch.float32),
        )

    def first(self, rows: int) -> "DecodeInputs":
        """The same memory, `rows` rows of it."""
        return DecodeInputs(**{name: getattr(self, name)[:rows] for name in DecodeInputs.__slots__})


@triton.jit
def _gather_kernel(
    slots_ptr,
    token_ids_ptr,
    block_tables_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    capacity_ptr,
    active_ptr,
    seed_ptr,
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    embedding_ptr,
    hidden_out,
    positions_out,
    slot_mapping_out,
    block_tables_out,
    context_lens_out,
    seeds_out,
    draw_positions_out,
    top_k_out,
    temperature_out,
    top_p_out,
    min_p_out,
    trash_slot,
    token_stride,
    MAX_BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
    INT_STRIDE: tl.constexpr,
    FLOAT_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    ints = slot * INT_STRIDE
    floats = slot * FLOAT_STRIDE
    position = tl.load(num_computed_ptr + ints)
    runs = (tl.load(active_ptr + ints) > 0) & (position < tl.load(capacity_ptr + ints))

    token = tl.load(token_ids_ptr + slot * token_stride + position).to(tl.int64)
    dims = tl.arange(0, HIDDEN_PADDED)
    embedded = tl.load(embedding_ptr + token * HIDDEN + dims, mask=dims < HIDDEN, other=0.0)
    tl.store(hidden_out + row * HIDDEN + dims, embedded, mask=dims < HIDDEN)

    blocks = tl.arange(0, BLOCKS_PADDED)
    table = tl.load(
        block_tables_ptr + slot * MAX_BLOCKS + blocks, mask=blocks < MAX_BLOCKS, other=0
    )
    tl.store(block_tables_out + row * MAX_BLOCKS + blocks, table, mask=blocks < MAX_BLOCKS)
    page = tl.minimum(position // PAGE, MAX_BLOCKS - 1)
    block = tl.load(block_tables_ptr + slot * MAX_BLOCKS + page).to(tl.int64)
    cache_slot = tl.where(runs, block * PAGE + position % PAGE, trash_slot)

    tl.store(positions_out + row, position)
    tl.store(slot_mapping_out + row, cache_slot)
    tl.store(context_lens_out + row, tl.where(runs, position + 1, 0).to(tl.int32))
    tl.store(seeds_out + row, tl.load(seed_ptr + ints))
    tl.store(draw_positions_out + row, tl.load(num_tokens_ptr + ints))
    tl.store(top_k_out + row, tl.load(top_k_ptr + ints).to(tl.int32))
    tl.store(temperature_out + row, tl.load(temperature_ptr + floats))
    tl.store(top_p_out + row, tl.load(top_p_ptr + floats))
    tl.store(min_p_out + row, tl.load(min_p_ptr + floats))


@triton.jit
def _append_kernel(
    slots_ptr,
    tokens_ptr,
    context_lens_ptr,
    token_ids_ptr,
    stop_token_ids_ptr,
    num_tokens_ptr,
    num_computed_ptr,
    max_total_tokens_ptr,
    active_ptr,
    results_ptr,
    rows,
    token_stride,
    NUM_STOP: tl.constexpr,
    NUM_STOP_PADDED: tl.constexpr,
    INT_STRIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    start_dependents(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    token = tl.load(tokens_ptr + row)
    flag = FINISH_NOT_RUN
    if tl.load(context_lens_ptr + row) > 0:
        ints = slot * INT_STRIDE
        length = tl.load(num_tokens_ptr + ints)
        tl.store(token_ids_ptr + slot * token_stride + length, token)
        tl.store(num_tokens_ptr + ints, length + 1)
        tl.store(num_computed_ptr + ints, tl.load(num_computed_ptr + ints) + 1)
        stops = tl.arange(0, NUM_STOP_PADDED)
        stop_ids = tl.load(
            stop_token_ids_ptr + slot * NUM_STOP + stops, mask=stops < NUM_STOP, other=-1
        )
        is_stop = tl.max((stop_ids == token).to(tl.int32), axis=0) > 0
        is_full = length + 1 >= tl.load(max_total_tokens_ptr + ints)
        flag = tl.where(is_stop, FINISH_STOP_TOKEN, tl.where(is_full, FINISH_LENGTH, FINISH_NONE))
        tl.store(active_ptr + ints, (flag == FINISH_NONE).to(tl.int64))
    tl.store(results_ptr + row, token)
    tl.store(results_ptr + rows + row, flag)


def gather_decode_inputs(
    slot_ids: Tensor,
    slots: SlotTensors,
    embedding: Tensor,
    out: DecodeInputs,
    *,
    block_size: int,
    trash_slot: int,
) -> None:
    """Fill `out` for the given slots.

    Args:
        slot_ids: [rows] int64; padding names a slot that is never active.
        slots: the slot state.
        embedding: [vocab_size, hidden_size].
        out: `rows` rows to write to.
        block_size: tokens per KV block.
        trash_slot: cache slot for rows that do not run.

    Raises:
        KernelInputError: slot_ids has the wrong shape or type.
    """
    rows = out.positions.shape[0]
    require_row_values("slot_ids", slot_ids, rows, torch.int64)
    max_blocks = slots.block_tables.shape[1]
    hidden_size = embedding.shape[1]
    _gather_kernel[(rows,)](
        slot_ids,
        slots.token_ids,
        slots.block_tables,
        slots.num_tokens,
        slots.num_computed,
        slots.capacity,
        slots.active,
        slots.seed,
        slots.top_k,
        slots.temperature,
        slots.top_p,
        slots.min_p,
        embedding,
        out.hidden,
        out.positions,
        out.slot_mapping,
        out.block_tables,
        out.context_lens,
        out.seeds,
        out.draw_positions,
        out.top_k,
        out.temperature,
        out.top_p,
        out.min_p,
        trash_slot,
        slots.token_ids.stride(0),
        MAX_BLOCKS=max_blocks,
        BLOCKS_PADDED=triton.next_power_of_2(max_blocks),
        INT_STRIDE=slots.num_tokens.stride(0),
        FLOAT_STRIDE=slots.temperature.stride(0),
        PAGE=block_size,
        HIDDEN=hidden_size,
        HIDDEN_PADDED=triton.next_power_of_2(hidden_size),
        num_warps=4,
    )


def append_tokens(
    slot_ids: Tensor,
    token_ids: Tensor,
    context_lens: Tensor,
    slots: SlotTensors,
    results: Tensor,
    *,
    dependent: bool = False,
) -> None:
    """Append each running row's token to its slot and decide whether the slot goes on.

    Args:
        slot_ids: [rows] int64.
        token_ids: [rows] int32, the sampled tokens.
        context_lens: [rows] int32 from `gather_decode_inputs`; 0 marks rows that did not run.
        slots: the slot state, updated in place.
        results: [2, rows] int32 to write to: tokens, then finish flags.
        dependent: programmatic dependent launch, see `rms_norm_linear`.

    Raises:
        KernelInputError: an argument has the wrong shape or type.
    """
    rows = slot_ids.shape[0]
    require_row_values("slot_ids", slot_ids, rows, torch.int64)
    require_row_values("token_ids", token_ids, rows, torch.int32)
    require_row_values("context_lens", context_lens, rows, torch.int32)
    require_dtype("results", results, torch.int32)
    num_stop = slots.stop_token_ids.shape[1]
    _append_kernel[(rows,)](
        slot_ids,
        token_ids,
        context_lens,
        slots.token_ids,
        slots.stop_token_ids,
        slots.num_tokens,
        slots.num_computed,
        slots.max_total_tokens,
        slots.active,
        results,
        rows,
        slots.token_ids.stride(0),
        NUM_STOP=num_stop,
        NUM_STOP_PADDED=triton.next_power_of_2(num_stop),
        INT_STRIDE=slots.num_tokens.stride(0),
        DEPENDENT=dependent,
        **launch_options(1, 1, dependent),
    )
