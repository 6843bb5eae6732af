"""One row of logits -> log-probability, entropy, KL, and the gradient of anything made of them."""

import torch
from torch import Tensor

from ppo_fast.ops._core.checks import accumulation_dtype
from ppo_fast.ops._core.inputs import RowGrads, RowInputs
from ppo_fast.ops._core.results import RowStats


def log_softmax(logits: Tensor, temperature: float, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(u, lse), the latter in float64. The largest logit is subtracted first, halved: no difference overflows.

    Not z - lse: with a logit offset of 3e4 a float32 lse is off by 1e-3, and so is every probability. A given ``lse``
    is that of the whole row, of which the logits may be a slice, even one that is -inf throughout.
    """
    x = logits.to(accumulation_dtype(logits.dtype))
    top = x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    z = (x / 2 - top / 2) / (temperature / 2)
    log_sum = z.logsumexp(-1, keepdim=True)
    own = (top.double() / temperature + log_sum.double())[..., 0]
    u = z - log_sum
    if lse is None:
        return u, own
    return torch.where(log_sum == -torch.inf, z, u) + (own - lse).to(u.dtype)[..., None], lse


def _expectation(p: Tensor, x: Tensor) -> Tensor:
    """sum_v p*x where p > 0: a word of probability 0 adds 0, not 0 * inf."""
    return torch.where(p == 0, 0.0, p * x).sum(-1)


def _where_counted(mask: Tensor | None, x: Tensor, other: Tensor | float = 0.0) -> Tensor:
    return x if mask is None else torch.where(mask, x, other)


def token_stats(rows: RowInputs, want_entropy: bool) -> RowStats:
    """The statistics of every row."""
    logits, targets, ref_logits, mask, temperature = rows
    u, lse = log_softmax(logits, temperature)
    logprobs, entropy, kl, ref_lse = (u.new_empty(0), u.new_empty(0), u.new_empty(0), lse.new_empty(0))
    if targets is not None:
        inside = (targets >= 0) & (targets < logits.shape[-1])
        picked = u.gather(-1, torch.where(inside, targets, 0).long()[..., None])[..., 0]
        logprobs = _where_counted(mask, torch.where(inside, picked, torch.nan))
    if want_entropy:
        entropy = _where_counted(mask, -_expectation(u.exp(), u))
    if ref_logits is not None:
        w, ref_lse = log_softmax(ref_logits, temperature)
        kl = _where_counted(mask, _expectation(u.exp(), u - w.to(u.dtype)))
    return RowStats(logprobs, entropy, kl, lse, ref_lse)


def token_stats_backward(
    grads: RowGrads, rows: RowInputs, stats: RowStats, out: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """dlogits[j] = (g*[j = target] + p[j]*(a + b*u[j] + c*w[j])) / temperature, in the dtype of the logits.

    g, gH and gK are the gradients in logprob, entropy and KL; a = -g - gH*H - gK*KL, b = gK - gH, c = -gK. A gradient
    of None leaves its term out, and ``scale`` [] multiplies all. ``out`` may be the logits themselves.
    """
    g, g_entropy, g_kl = grads.scaled(scale)
    logits, targets, ref_logits, mask, temperature = rows
    entropy, kl = stats.entropy, stats.kl
    u, _ = log_softmax(logits, temperature, stats.lse)
    inner = torch.zeros_like(u)
    if g is not None:
        inner = inner - g[..., None]
    if g_entropy is not None:
        inner = inner - g_entropy[..., None] * (entropy[..., None] + u)
    if g_kl is not None and ref_logits is not None:
        w, _ = log_softmax(ref_logits, temperature, stats.ref_lse)
        inner = inner + g_kl[..., None] * (u - w.to(u.dtype) - kl[..., None])
    p = u.exp()
    grad = torch.where(p == 0, 0.0, p * inner)
    if g is not None and targets is not None:
        inside = (targets >= 0) & (targets < logits.shape[-1])
        column = torch.where(inside, targets, 0).long()[..., None]
        grad = grad.scatter_add(-1, column, torch.where(inside, g, 0.0)[..., None])
    if mask is not None:
        grad = torch.where(mask[..., None], grad, 0.0)
    grad = (grad / temperature).to(logits.dtype)
    return grad if out is None else out.copy_(grad)
