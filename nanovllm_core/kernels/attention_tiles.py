"""Online softmax over tiles of the paged KV cache, shared by decode and prefill attention.

Per score tile S = q K^T * scale * log2(e), with running maximum m, sum l and accumulator acc:

    m' = max(m, max S);  P = 2^(S - m');  l = l 2^(m - m') + sum P;  acc = acc 2^(m - m') + P V

(Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao et al. 2022,
https://arxiv.org/abs/2205.14135.) Powers of two because that is the hardware's instruction.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import triton
import triton.language as tl


@triton.jit
def cache_slots(
    table_ptr,
    start,
    positions,
    end,
    PAGE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Flat cache slots (int64 [BLOCK_KV]) of token positions start + 0 .. BLOCK_KV - 1.

    start is a multiple of BLOCK_KV and both are powers of two, so a tile lies within one page or
    covers whole pages.
    """
    if PAGE >= BLOCK_KV:
        if MASKED:
            # An empty tile may start behind the end of the table's row.
            block = tl.load(table_ptr + start // PAGE, mask=start < end, other=0).to(tl.int64)
        else:
            block = tl.load(table_ptr + start // PAGE).to(tl.int64)
        return block * PAGE + positions % PAGE
    else:
        if MASKED:
            blocks = tl.load(table_ptr + positions // PAGE, mask=positions < end, other=0)
        else:
            blocks = tl.load(table_ptr + positions // PAGE)
        return blocks.to(tl.int64) * PAGE + positions % PAGE


@triton.jit
def fold_tile(
    q,
    k,
    v,
    running_max,
    running_sum,
    acc,
    positions,
    query_positions,
    scale_log2,
    MASKED: tl.constexpr,
):
    """Fold one tile of keys and values into the running softmax of every query row.

    Args:
        q: [rows, BLOCK_D].
        k, v: [BLOCK_KV, BLOCK_D].
        running_max, running_sum: [rows] float32.  acc: [rows, BLOCK_D] float32.
        positions: [BLOCK_KV], of the keys.
        query_positions: [rows]; with MASKED, a row sees tokens up to and including its position,
            and at least one of them.
        scale_log2: softmax scale times log2(e).

    Returns:
        (running_max, running_sum, acc).
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        visible = positions[None, :] <= query_positions[:, None]
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(scores, axis=1))
    rescale = tl.exp2(running_max - new_max)
    weights = tl.exp2(scores - new_max[:, None])
    running_sum = running_sum * rescale + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return new_max, running_sum, acc


@triton.jit
def attend_tiles(
    q,
    running_max,
    running_sum,
    acc,
    query_positions,
    begin,
    end,
    table_ptr,
    key_ptr,
    value_ptr,
    scale_log2,
    SLOT_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold the tokens [begin, end) into the running softmax of every query row.

    Args:
        q: [rows, BLOCK_D].
        running_max, running_sum: [rows] float32.  acc: [rows, BLOCK_D] float32.
        query_positions: [rows]; with MASKED, a row sees tokens up to and including its position.
        begin: multiple of BLOCK_KV. end: anything with MASKED, else a multiple of BLOCK_KV.
        table_ptr: the sequence's row of the block table.
        key_ptr, value_ptr: the caches, already offset to the KV head.
        scale_log2: softmax scale times log2(e).

    Returns:
        (running_max, running_sum, acc).
    """
    offs_d = tl.arange(0, BLOCK_D)
    inside_d = (offs_d < HEAD_DIM)[None, :]
    for start in range(begin, end, BLOCK_KV):
        positions = start + tl.arange(0, BLOCK_KV)
        slots = cache_slots(table_ptr, start, positions, end, PAGE, BLOCK_KV, MASKED)
        offsets = slots[:, None] * SLOT_STRIDE + offs_d[None, :]
        if MASKED:
            # Slots past the end may hold NaN that nobody wrote; zero times NaN would survive.
            mask = (positions < end)[:, None] & inside_d
            k = tl.load(key_ptr + offsets, mask=mask, other=0.0)
            v = tl.load(value_ptr + offsets, mask=mask, other=0.0)
        elif BLOCK_D != HEAD_DIM:
            k = tl.load(key_ptr + offsets, mask=inside_d, other=0.0)
            v = tl.load(value_ptr + offsets, mask=inside_d, other=0.0)
        else:
            k = tl.load(key_ptr + offsets)
            v = tl.load(value_ptr + offsets)
        running_max, running_sum, acc = fold_tile(
            q,
            k,
            v,
            running_max,
            running_sum,
            acc,
            positions,
            query_positions,
            scale_log2,
            MASKED,
        )
    return running_max, running_sum, acc
