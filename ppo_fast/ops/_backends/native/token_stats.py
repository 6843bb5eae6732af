"""Launchers of token_stats in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.rows import gradient_view, per_row, readable, room, rows_of, set_addresses


def token_stats(
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    want_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`ppo_fast.ops._backends.reference.token_stats`."""
    ref_logits = readable(ref_logits)
    full = ref_logits is not None
    logprobs, entropy, kl = (per_row(logits, wanted) for wanted in (targets is not None, want_entropy, full))
    lse, ref_lse = per_row(logits, dtype=torch.float64), per_row(logits, full, torch.float64)
    arguments = extension.TokenStatsArguments()
    arguments.rows = rows_of(logits, targets, ref_logits, mask, temperature)
    set_addresses(arguments, logprobs=logprobs, entropy=entropy, kl=kl, lse=lse, ref_lse=ref_lse)
    extension.token_stats(arguments, threads=torch.get_num_threads())
    return logprobs, entropy, kl, lse, ref_lse


def token_stats_backward(
    g: Tensor | None,
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor,
    entropy: Tensor,
    kl: Tensor,
    temperature: float,
    out: Tensor | None = None,
) -> Tensor:
    """The reference's token_stats_backward. ``out`` has the strides of the logits, and may be the logits."""
    ref_logits = None if g_kl is None else readable(ref_logits)
    gradient = room(logits.shape, logits.dtype) if out is None else out
    arguments = extension.TokenStatsBackwardArguments()
    arguments.rows = rows_of(logits, targets, ref_logits, mask, temperature)
    arguments.out = gradient_view(gradient, logits)
    set_addresses(arguments, g=g, g_entropy=g_entropy, g_kl=g_kl, lse=lse, ref_lse=ref_lse, entropy=entropy, kl=kl)
    extension.token_stats_backward(arguments, threads=torch.get_num_threads())
    return gradient
