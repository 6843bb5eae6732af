"""Launchers of token_stats in C++."""

import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import is_large, like, readable, room
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import RowStats


def token_stats(rows: RowInputs, want_entropy: bool) -> RowStats:
    """The statistics of every row."""
    rows = readable(rows)
    full, lse = rows.ref_logits is not None, room(rows.logits.shape[:2], torch.float64)
    stats = RowStats(
        like(lse, rows.targets is not None, torch.float32),
        like(lse, want_entropy, torch.float32),
        like(lse, full, torch.float32),
        lse,
        like(lse, full),
    )
    extension.token_stats(rows, stats, torch.get_num_threads())
    return stats


def token_stats_backward(
    grads: RowGrads, rows: RowInputs, stats: RowStats, out: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The gradient of the logits. ``out`` has the strides of the logits, and may be the logits."""
    grads = grads.scaled(scale)
    rows = rows._replace(ref_logits=None) if grads.grad_kl is None else readable(rows)
    logits = rows.logits
    gradient = room(logits.shape, logits.dtype) if out is None else out
    extension.token_stats_backward(grads, rows, stats, gradient, is_large(gradient), torch.get_num_threads())
    return gradient
