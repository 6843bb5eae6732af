"""One token drawn from each row: one read of the logits, and a row's segments in parallel, as in ``token_stats``.

With p = exp((x - max x) / temperature) and exponential noise e, the token is argmax p / e. Each lane keeps its leader
(p, e) with p against the lane's running maximum. The partial results are [3, N, segments] in float32 (m, s, the largest
p / e) and the word that holds it. With a filter :mod:`sample_filters` finds the smallest logit that is kept.
"""

import torch
import triton
import triton.language as tl

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import (
    LN2,
    LOG2_E,
    LOWEST,
    floored,
    fold,
    moved_s,
    on_device_of,
    row_offset,
    tile,
)
from ppo_fast.ops._backends.triton.sample_filters import smallest_kept
from ppo_fast.ops._backends.triton.token_stats import aligned, merged, row_strides, store_row
from ppo_fast.ops._core.inputs import SampleInputs
from ppo_fast.ops._core.results import SampledTokens

GROUP: tl.constexpr = tl.constexpr(4)  # words of one call of philox
NOBODY: tl.constexpr = tl.constexpr(0x7FFFFFFF)


@triton.jit
def exponential(words):
    """-log(1 - x) with x = (k + 1/2) / 2^31, k the upper 31 bits; below 1/32 the series keeps what 1 - x loses."""
    k = (words >> 1).to(tl.int32)
    x = (k.to(tl.float32) + 0.5) * 4.656612873077393e-10
    rest = ((0x7FFFFFFF - k).to(tl.float32) + 0.5) * 4.656612873077393e-10
    series = tl.fma(x, tl.fma(x, tl.fma(x, x * 0.2 + 0.25, 1.0 / 3), 0.5) * x, x)
    return tl.where(k < 0x4000000, series, -tl.log(rest))


@triton.jit
def noise(key_ptr, first, LANES: tl.constexpr):
    """Exponential variables [LANES, 4] of the words from ``first`` on, a multiple of 4."""
    seed, row, step = tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(key_ptr + 2)
    zero = tl.zeros([LANES], tl.int32)
    counter = first // 4 + tl.arange(0, LANES)
    low, high = zero + (row & 0xFFFFFFFF).to(tl.int32), zero + (row >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, counter, zero + step.to(tl.int32), low, high)
    return exponential(tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [LANES, 4]))


@triton.jit(do_not_specialize=["T", "stride_b", "stride_t"])
def segment_kernel(
    logits_ptr,
    keys_ptr,
    smallest_ptr,
    partials_ptr,
    words_ptr,
    T,
    V,
    stride_b: tl.int64,
    stride_t: tl.int64,
    scale,
    ALIGNED: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The partial results of one segment of one row; words below the row's smallest, if given, do not race."""
    LANES: tl.constexpr = BLOCK // GROUP
    segments = tl.cdiv(V, SEGMENT)
    row = tl.program_id(0) // segments
    first = (tl.program_id(0) - row * segments) * SEGMENT
    x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, ALIGNED)
    key_ptr = keys_ptr + row.to(tl.int64) * 3
    smallest = -float("inf")
    if smallest_ptr is not None:
        smallest = tl.load(smallest_ptr + row)
    m = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    columns = tile(0, BLOCK, GROUP, True)
    lead_p = tl.zeros([LANES, GROUP], tl.float32)
    lead_e = lead_p + 1.0
    lead_word = tl.zeros([LANES, GROUP], tl.int32)
    for start in range(first, tl.minimum(first + SEGMENT, V), BLOCK):
        x = tl.load(tile(x_ptr + start, BLOCK, GROUP, True), columns < V - start, other=-float("inf")).to(tl.float32)
        m, s, shift, _, p = fold(x, m, s, scale, 1)
        e = noise(key_ptr, start, LANES)
        lead_p *= tl.exp2(shift)[:, None]
        if smallest_ptr is not None:
            p = tl.where(x >= smallest, p, 0.0)
        wins = p * lead_e > lead_p * e
        lead_p, lead_e = tl.where(wins, p, lead_p), tl.where(wins, e, lead_e)
        lead_word = tl.where(wins, start + columns, lead_word)
    top = tl.max(m, 0)
    shift = floored((m - top) * scale)
    ratio = lead_p * tl.exp2(shift)[:, None] / lead_e
    best = tl.max(tl.max(ratio, 1), 0)
    field, part = tl.num_programs(0).to(tl.int64), tl.program_id(0)
    tl.store(partials_ptr + part, top)
    tl.store(partials_ptr + field + part, tl.sum(moved_s(s, shift), 0))
    tl.store(partials_ptr + 2 * field + part, best)
    tl.store(words_ptr + part, tl.min(tl.min(tl.where(ratio == best, lead_word, NOBODY), 1), 0))


@triton.jit(do_not_specialize=["N", "T", "stride_b", "stride_t"])
def merge_kernel(
    partials_ptr,
    words_ptr,
    logits_ptr,
    tokens_ptr,
    logprobs_ptr,
    N,
    T,
    stride_b: tl.int64,
    stride_t: tl.int64,
    scale,
    inv_temperature,
    SEGMENTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merges the segments of ROWS rows in their order; WIDTH >= SEGMENTS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    segment = tl.arange(0, WIDTH)[None, :]
    part = exists[:, None] & (segment < SEGMENTS)
    offset = row[:, None].to(tl.int64) * SEGMENTS + segment
    field = N.to(tl.int64) * SEGMENTS
    top, total, _, shift = merged(partials_ptr + offset, field, part, scale)
    ratio = tl.load(partials_ptr + 2 * field + offset, part, other=0.0) * tl.exp2(shift)
    word = tl.load(words_ptr + offset, part, other=NOBODY)
    word = tl.min(tl.where(ratio == tl.max(ratio, 1)[:, None], word, NOBODY), 1)
    valid = total > 0.0
    token = tl.where(valid & exists, word, 0)
    x_ptr = logits_ptr + row_offset(row, T, stride_b, stride_t, False) + token
    x = tl.load(x_ptr, exists, other=0.0).to(tl.float32)
    logprob = tl.fma(x * 0.5 - top * 0.5, 2.0 * inv_temperature, -tl.log2(total) * LN2)
    store_row(logprobs_ptr, row, tl.where(valid, logprob, float("nan")), exists, exists)
    tl.store(tokens_ptr + row, token.to(tl.int64), exists)


def sample_tokens(inputs: SampleInputs) -> SampledTokens:
    """A token of every row, and its log-probability."""
    logits, keys, temperature, _, _ = inputs
    B, T, V = logits.shape
    N, scale = B * T, LOG2_E.value / temperature
    tokens, logprobs = keys.new_empty(B, T), logits.new_empty(B, T, dtype=torch.float32)
    whole_groups = aligned(logits)
    size = tuning.sample_tile(logits)
    segments = tuning.cdiv(V, size.segment)
    width = tuning.next_power_of_2(segments)
    rows_per_program = max(1, tuning.PARTIALS // width)
    with on_device_of(logits):
        partials = logits.new_empty(3, N, segments, dtype=torch.float32)
        words = logits.new_empty(N, segments, dtype=torch.int32)
        segment_kernel[(N * segments,)](
            logits,
            keys,
            smallest_kept(inputs, whole_groups),
            partials,
            words,
            T,
            V,
            *row_strides(logits),
            scale,
            ALIGNED=whole_groups,
            SEGMENT=size.segment,
            BLOCK=size.block,
            num_warps=size.warps,
        )
        merge_kernel[(tuning.cdiv(N, rows_per_program),)](
            partials,
            words,
            logits,
            tokens,
            logprobs,
            N,
            T,
            *row_strides(logits),
            scale,
            1.0 / temperature,
            SEGMENTS=segments,
            WIDTH=width,
            ROWS=rows_per_program,
            enable_fp_fusion=False,
        )
    return SampledTokens(tokens, logprobs)
