"""Per-token terms summed in a fixed order: partial sums by program, then one program per total. No atomics.

The number of tokens that count is a total itself. Where it is the denominator of the loss, the programs that make the
totals also divide what the per-token kernel has written before it was known.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning


@triton.jit
def number(x):
    """A number that comes as it is, or in a 0-d tensor."""
    value = x
    if isinstance(x, tl.tensor) and x.dtype.is_ptr():  # the interpreter passes a number on as a float
        value = tl.load(x)
    return value


@triton.jit
def token_weight(weights_ptr, denominator, row, counted):
    """The weight of each token in the loss: given, 1/denominator, or 1 where the totals divide; else 0."""
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, counted, other=0.0)
    elif denominator is not None:
        weight = tl.where(counted, tl.div_rn(counted.to(tl.float32), number(denominator)), 0.0)
    else:
        weight = counted.to(tl.float32)
    return weight


@triton.jit
def store_partial(partials_ptr, index: tl.constexpr, terms):
    """The program's sum of ``terms``, in row ``index`` of ``partials`` [totals, programs]."""
    tl.store(partials_ptr + index * tl.num_programs(0) + tl.program_id(0), tl.sum(terms, 0))


@triton.jit
def max_or_nan(x, total):
    """The largest element, NaN where the sum is: ``tl.max`` drops a NaN."""
    return tl.where(total == total, tl.max(x, 0), total)


@triton.jit
def divide(ptr, row, exists, count):
    """Divides elements in place; a pointer of None is left out."""
    if ptr is not None:
        tl.store(ptr + row, tl.div_rn(tl.load(ptr + row, exists, other=0.0), count), exists)


@triton.jit(do_not_specialize=["N", "P"])
def totals_kernel(
    partials_ptr,
    loss_ptr,
    metrics_ptr,
    grad_ptr,
    other_grad_ptr,
    third_grad_ptr,
    N,
    P,
    BY_COUNT: tl.constexpr,
    BY_SEQUENCES: tl.constexpr,
    MAXIMUM: tl.constexpr,
    TOTALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row i of ``partials`` [TOTALS, P] to its total, in program i: row 0 the loss, row i > 0 metric i - 1.

    Rows 0 and 1 are sums, the last is the number of tokens, row MAXIMUM (if any) a maximum with 0; the others are
    means over the tokens. BY_COUNT: rows 0 and 1 are means too, and BLOCK of the N gradients per program are divided;
    BY_SEQUENCES: these are means over the sequences, whose number is the total of one row more.
    """
    index = tl.minimum(tl.program_id(0), TOTALS - 1)
    column = tl.arange(0, BLOCK)
    sums, tokens = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    largest, sequences = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, P, BLOCK):
        exists = start + column < P
        part = tl.load(partials_ptr + index * P + start + column, exists, other=0.0)
        sums += part
        tokens += tl.load(partials_ptr + (TOTALS - 1) * P + start + column, exists, other=0.0)
        if BY_SEQUENCES:
            sequences += tl.load(partials_ptr + TOTALS * P + start + column, exists, other=0.0)
        largest = tl.maximum(largest, part)
    total, count = tl.sum(sums, 0), tl.maximum(tl.sum(tokens, 0), 1.0)
    loss_count = tl.maximum(tl.sum(sequences, 0), 1.0) if BY_SEQUENCES else count
    FIRST_MEAN: tl.constexpr = 0 if BY_COUNT else 2
    if (index >= FIRST_MEAN) & (index < TOTALS - 1):
        total = tl.div_rn(total, tl.where(index < 2, loss_count, count))
    if index == MAXIMUM:
        total = max_or_nan(largest, tl.sum(sums, 0))
    if tl.program_id(0) == 0:
        tl.store(loss_ptr, total)
    elif tl.program_id(0) < TOTALS:
        tl.store(metrics_ptr + index - 1, total)
    if BY_COUNT:
        row = tl.program_id(0).to(tl.int64) * BLOCK + column
        divide(grad_ptr, row, row < N, loss_count)
        divide(other_grad_ptr, row, row < N, loss_count)
        divide(third_grad_ptr, row, row < N, loss_count)


def new_partials(like: Tensor, totals: int, rows: int = tuning.ROWS) -> Tensor:
    """Room for the partial sums of a kernel over ``like`` whose programs take ``rows`` tokens: [totals, programs]."""
    return like.new_empty(totals, tuning.cdiv(like.numel(), rows), dtype=torch.float32)


def totals(
    partials: Tensor, grads: tuple[Tensor | None, ...] | None = None, maximum: int = -1, by_sequences: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss, metrics) from ``partials`` [totals, programs]: see :func:`totals_kernel`. The caller chooses the device.

    ``grads``: the per-token gradients to be divided by the number of tokens, the first of them not None, as is the
    loss; None: the terms have been weighted. ``by_sequences``: by that of the sequences, whose row is the last.
    """
    rows, programs = partials.shape[0] - by_sequences, partials.shape[1]
    loss, metrics = partials.new_empty(()), partials.new_empty(rows - 1)
    first, *others = grads or (None,)
    N = 0 if first is None else first.numel()
    totals_kernel[(max(rows, tuning.cdiv(N, tuning.ROWS)),)](
        partials,
        loss,
        metrics,
        first if N else None,
        *others,
        *(None,) * (2 - len(others)),
        N,
        programs,
        BY_COUNT=grads is not None,
        BY_SEQUENCES=by_sequences,
        MAXIMUM=maximum,
        TOTALS=rows,
        BLOCK=tuning.ROWS,
    )
    return loss, metrics
