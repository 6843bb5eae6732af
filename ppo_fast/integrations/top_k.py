"""Log-probabilities of several tokens per row, in the passes that one token takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.layout import as_logits
from ppo_fast.ops._core.results import RowStats
from ppo_fast.ops.token_stats import token_stats_backward


class _TopK(torch.autograd.Function):
    """z[index] - lse of logits [B, T, V] and index [B, T, K], with z = logits / temperature.

    The gradient ``sum_k g_k*[j = index_k] - p[j]*sum_k g_k`` is that of one token with the upstream ``sum_k g_k``, but
    in the columns of the K tokens. These are computed in float32 and written over it, so that all is rounded once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, temperature: float, backend: str) -> Tensor:
        logits, first = logits.detach(), index[..., 0].contiguous()
        rows = RowInputs(logits, first, None, None, temperature)
        stats = RowStats(*torch.ops.ppo_fast.token_stats(*rows, False, backend))
        ctx.save_for_backward(logits, index, first, *stats)
        ctx.temperature, ctx.backend = temperature, backend
        logprobs = logits.gather(-1, index).double() / temperature - stats.lse.unsqueeze(-1)
        return logprobs.to(checks.accumulation_dtype(logits.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        logits, index, first, *saved = ctx.saved_tensors
        rows, stats = RowInputs(logits, first, None, None, ctx.temperature), RowStats(*saved)
        total = g.sum(-1)
        dlogits = token_stats_backward(RowGrads(total, None, None), rows, stats, ctx.backend)
        p = (logits.gather(-1, index).double() / ctx.temperature - stats.lse.unsqueeze(-1)).exp().to(g.dtype)
        repeats = (index.unsqueeze(-1) == index.unsqueeze(-2)).to(g.dtype)  # a token may be asked for twice
        at_index = (repeats @ g.unsqueeze(-1)).squeeze(-1) - p * total.unsqueeze(-1)
        b, t = (torch.arange(n, device=index.device) for n in index.shape[:2])
        # scatter_ would hold a float32 copy of a bfloat16 tensor on a CPU.
        dlogits[b[:, None, None], t[:, None], index] = (at_index / ctx.temperature).to(dlogits.dtype)
        return dlogits, None, None, None


def top_k_logprobs(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [..., K] of ``index`` [..., K] under logits [..., V]; float32, float64 for float64 logits."""
    backend = registry.resolve("token_logprobs", "auto", logits.device, logits.dtype)
    rows, K = as_logits(logits), index.shape[-1]
    flat = index.reshape(*rows.shape[:2], K)
    return _TopK.apply(rows, flat, float(temperature), backend).view(index.shape)
