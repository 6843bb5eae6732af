"""Per-token terms summed in a fixed order: partial sums by program, then one program per total. No atomics."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import on_device_of


@triton.jit
def store_partial(partials_ptr, index: tl.constexpr, terms):
    """The program's sum of ``terms``, in row ``index`` of ``partials`` [totals, programs]."""
    tl.store(partials_ptr + index * tl.num_programs(0) + tl.program_id(0), tl.sum(terms, 0))


@triton.jit
def max_or_nan(x, total):
    """The largest element, NaN where the sum is: ``tl.max`` drops a NaN."""
    return tl.where(total == total, tl.max(x, 0), total)


@triton.jit(do_not_specialize=["P"])
def totals_kernel(partials_ptr, loss_ptr, metrics_ptr, P, MAXIMUM: tl.constexpr, BLOCK: tl.constexpr):
    """Row i of ``partials`` [totals, P] to its total: row 0 the loss, row i > 0 metric i - 1.

    Rows 0 and 1 are sums, the last is the number of tokens, row MAXIMUM (if any) a maximum with 0; the others are
    means over the tokens.
    """
    index, tokens_row = tl.program_id(0), tl.num_programs(0) - 1
    column = tl.arange(0, BLOCK)
    sums, tokens = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        exists = start + column < P
        part = tl.load(partials_ptr + index * P + start + column, exists, other=0.0)
        sums += part
        tokens += tl.load(partials_ptr + tokens_row * P + start + column, exists, other=0.0)
        largest = tl.maximum(largest, part)
    total = tl.sum(sums, 0)
    if (index >= 2) & (index < tokens_row):
        total /= tl.maximum(tl.sum(tokens, 0), 1.0)
    if index == MAXIMUM:
        total = max_or_nan(largest, total)
    if index == 0:
        tl.store(loss_ptr, total)
    else:
        tl.store(metrics_ptr + index - 1, total)


def new_partials(like: Tensor, totals: int) -> Tensor:
    """Room for the partial sums of a per-token kernel over ``like``: [totals, programs]."""
    return like.new_empty(totals, triton.cdiv(like.numel(), tuning.ROWS), dtype=torch.float32)


def totals(partials: Tensor, maximum: int = -1) -> tuple[Tensor, Tensor]:
    """(loss, metrics) from ``partials`` [totals, programs]: see :func:`totals_kernel`."""
    rows, programs = partials.shape
    loss, metrics = partials.new_empty(()), partials.new_empty(rows - 1)
    with on_device_of(partials):
        totals_kernel[(rows,)](partials, loss, metrics, programs, MAXIMUM=maximum, BLOCK=256)
    return loss, metrics
