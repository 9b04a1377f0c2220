"""The beginning of a captured prefill: embed the chunks' tokens and find their cache slots.

The host names the tokens of all chunks by (slot, position); their ids and the slots' block tables
are on the device.

    token t:  hidden = embedding[token_ids[slot, position]];  positions;  slot_mapping
    chunk c:  num_computed[slot] = computed;  active[slot] = whether the slot decodes from now on

Rows of padding have a negative position and write to the trash slot of the cache.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm_core.kernels.checks import require_row_values
from nanovllm_core.kernels.decode_step import SlotTensors


@triton.jit
def _embed_chunks_kernel(
    slots_ptr,
    positions_ptr,
    token_ids_ptr,
    block_tables_ptr,
    embedding_ptr,
    hidden_out,
    positions_out,
    slot_mapping_out,
    trash_slot,
    token_stride,
    table_stride,
    PAGE: tl.constexpr,
    HIDDEN: tl.constexpr,
    HIDDEN_PADDED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    named = tl.load(positions_ptr + row).to(tl.int64)
    position = tl.maximum(named, 0)
    token = tl.load(token_ids_ptr + slot * token_stride + position).to(tl.int64)
    dims = tl.arange(0, HIDDEN_PADDED)
    embedded = tl.load(embedding_ptr + token * HIDDEN + dims, mask=dims < HIDDEN, other=0.0)
    tl.store(hidden_out + row * HIDDEN + dims, embedded, mask=dims < HIDDEN)
    block = tl.load(block_tables_ptr + slot * table_stride + position // PAGE).to(tl.int64)
    cache_slot = tl.where(named >= 0, block * PAGE + position % PAGE, trash_slot)
    tl.store(positions_out + row, position)
    tl.store(slot_mapping_out + row, cache_slot)


@triton.jit
def _start_slots_kernel(
    slots_ptr,
    computed_ptr,
    decodes_ptr,
    num_computed_ptr,
    active_ptr,
    INT_STRIDE: tl.constexpr,
):
    chunk = tl.program_id(0)
    ints = tl.load(slots_ptr + chunk).to(tl.int64) * INT_STRIDE
    tl.store(num_computed_ptr + ints, tl.load(computed_ptr + chunk).to(tl.int64))
    tl.store(active_ptr + ints, tl.load(decodes_ptr + chunk).to(tl.int64))


def embed_chunks(
    token_slots: Tensor,
    token_positions: Tensor,
    slots: SlotTensors,
    embedding: Tensor,
    hidden: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    block_size: int,
    trash_slot: int,
) -> None:
    """Fill hidden, positions and slot_mapping for the named tokens.

    Args:
        token_slots: [tokens] int32, the slot of each token.
        token_positions: [tokens] int32, its index in the slot's sequence; negative for padding.
        slots: the slot state.
        embedding: [vocab_size, hidden_size].
        hidden: [tokens, hidden_size] to write to.
        positions, slot_mapping: [tokens] int64 to write to; positions are 0 for padding.
        block_size: tokens per KV block.
        trash_slot: cache slot of padding.

    Raises:
        KernelInputError: an argument has the wrong shape or type.
    """
    tokens, hidden_size = hidden.shape
    require_row_values("token_slots", token_slots, tokens, torch.int32)
    require_row_values("token_positions", token_positions, tokens, torch.int32)
    require_row_values("positions", positions, tokens, torch.int64)
    require_row_values("slot_mapping", slot_mapping, tokens, torch.int64)
    _embed_chunks_kernel[(tokens,)](
        token_slots,
        token_positions,
        slots.token_ids,
        slots.block_tables,
        embedding,
        hidden,
        positions,
        slot_mapping,
        trash_slot,
        slots.token_ids.stride(0),
        slots.block_tables.stride(0),
        PAGE=block_size,
        HIDDEN=hidden_size,
        HIDDEN_PADDED=triton.next_power_of_2(hidden_size),
        num_warps=4,
    )


def start_slots(
    chunk_slots: Tensor, num_computed: Tensor, decodes: Tensor, slots: SlotTensors
) -> None:
    """Note how far each chunk's slot is computed, and whether it decodes from now on.

    Args:
        chunk_slots, num_computed, decodes: [chunks] int32 each; decodes is 0 or 1.
        slots: the slot state, updated in place.

    Raises:
        KernelInputError: an argument has the wrong shape or type.
    """
    chunks = chunk_slots.shape[0]
    require_row_values("chunk_slots", chunk_slots, chunks, torch.int32)
    require_row_values("num_computed", num_computed, chunks, torch.int32)
    require_row_values("decodes", decodes, chunks, torch.int32)
    _start_slots_kernel[(chunks,)](
        chunk_slots,
        num_computed,
        decodes,
        slots.num_computed,
        slots.active,
        INT_STRIDE=slots.num_computed.stride(0),
        num_warps=1,
    )
