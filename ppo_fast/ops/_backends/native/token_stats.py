"""Launchers of token_stats in C++."""

import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import gradient_view, readable, room, rows_view, stats_room
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import RowStats


def token_stats(rows: RowInputs, want_entropy: bool) -> RowStats:
    """The statistics of every row."""
    rows = readable(rows)
    stats = stats_room(rows, want_entropy)
    extension.token_stats(rows_view(rows), threads=torch.get_num_threads(), **stats._asdict())
    return stats


def token_stats_backward(
    grads: RowGrads, rows: RowInputs, stats: RowStats, out: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The gradient of the logits. ``out`` has the strides of the logits, and may be the logits."""
    grads = grads.scaled(scale)
    rows = rows._replace(ref_logits=None) if grads.grad_kl is None else readable(rows)
    logits = rows.logits
    gradient = room(logits.shape, logits.dtype) if out is None else out
    extension.token_stats_backward(
        rows_view(rows),
        gradient_view(gradient, logits),
        threads=torch.get_num_threads(),
        lse=stats.lse,
        ref_lse=stats.ref_lse,
        entropy=stats.entropy,
        kl=stats.kl,
        **grads._asdict(),
    )
    return gradient
