"""Attention of one query token of each slot to the slot's keys and values, up to its position and no further.

A program takes one key head of one slot, whose query heads are the rows of a tile, so keys and values are read once.
The softmax is the online one (Milakov & Gimelshein 2018, arXiv:1805.02867).
"""

import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 2**14  # of a tile of keys: two programs with three stages of two tiles fit a multiprocessor


@triton.jit
def slot_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    positions_ptr,
    output_ptr,
    query_stride_slot,
    query_stride_head,
    key_stride_slot: tl.int64,
    key_stride_head: tl.int64,
    key_stride_row,
    scale,  # of the scores
    softcap,
    window,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    ROWS: tl.constexpr,  # rows of the query's tile, 16 or more
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,  # the power of two from WIDTH on
    KEYS: tl.constexpr,
    SOFTCAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output [S, HEADS * GROUP, WIDTH], contiguous; values have the strides of the keys."""
    slot = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    rows, columns, keys = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, KEYS)
    inside = columns < WIDTH
    end = tl.load(positions_ptr + slot) + 1
    start = tl.zeros_like(end)
    if WINDOWED:
        start = tl.maximum(end - window, 0)
    query_rows = query_ptr + slot * query_stride_slot + (head * GROUP + rows)[:, None] * query_stride_head
    used = (rows < GROUP)[:, None] & inside[None]
    query = tl.load(query_rows + columns[None], mask=used, other=0.0)
    offset = slot.to(tl.int64) * key_stride_slot + head.to(tl.int64) * key_stride_head
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start // KEYS * KEYS, end, KEYS):
        at = first + keys
        seen = (at >= start) & (at < end)
        place = offset + at[:, None] * key_stride_row + columns[None]
        tile = seen[:, None] & inside[None]
        key = tl.load(key_ptr + place, mask=tile, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        if SOFTCAPPED:
            # tanh(x) = 1 - 2 / (exp(2 x) + 1), exact at both ends of the line.
            scores = softcap * (1 - 2 / (tl.exp(2 * scores / softcap) + 1))
        scores = tl.where(seen[None], scores, float("-inf"))
        # A tile holds a key that is seen, so `new` is finite.
        new = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp(highest - new)
        weights = tl.exp(scores - new[:, None])
        value = tl.load(value_ptr + place, mask=tile, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        highest = new
    output = output_ptr + ((slot * HEADS + head) * GROUP + rows)[:, None] * WIDTH + columns[None]
    tl.store(output, (sums / total[:, None]).to(output_ptr.dtype.element_ty), mask=used)


def slot_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return [S, 1, H, E] of query [S, H, 1, E] to keys and values [S, K, L, E], for positions [S] below L.

    Args:
        query, key, value: of one dtype; neighbors of the last dimension are neighbors in memory, `key` and `value`
            have equal strides.
        positions: int64, of the query's token, which is the last that is seen.
        window: tokens that are seen at most; None: all.
        softcap: c of c tanh(score / c); None: the scores as they are.
    """
    slots, heads, _, width = query.shape
    count = key.shape[1]
    columns = max(16, triton.next_power_of_2(width))
    output = query.new_empty(slots, 1, heads, width)
    slot_attention_kernel[(slots * count,)](
        query,
        key,
        value,
        positions,
        output,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        key.stride(2),
        width**-0.5 if scaling is None else scaling,
        softcap or 0.0,
        window or 0,
        HEADS=count,
        GROUP=heads // count,
        ROWS=max(16, triton.next_power_of_2(heads // count)),
        WIDTH=width,
        COLUMNS=columns,
        KEYS=max(16, min(64, TILE_BYTES // (columns * key.element_size()))),
        SOFTCAPPED=softcap is not None,
        WINDOWED=window is not None,
        PRECISION="ieee",
        num_warps=4,
        num_stages=3,
    )
    return output
