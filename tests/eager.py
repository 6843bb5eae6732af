"""What a trainer writes by hand: the losses in plain torch with autograd, every [.., V] intermediate kept.

The error of this code is the measure of ours, and its speed the baseline of the benchmarks.
"""

import torch
from torch import Tensor

from ppo_fast import PolicyLossConfig


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def token_stats(
    logits: Tensor, targets: Tensor, ref_logits: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprobs, entropy, KL to the reference) of every row."""
    u = torch.log_softmax(_upcast(logits) / temperature, -1)
    logprobs = u.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    entropy = -(u.exp() * u).sum(-1)
    if ref_logits is None:
        return logprobs, entropy, None
    w = torch.log_softmax(_upcast(ref_logits) / temperature, -1)
    return logprobs, entropy, (u.exp() * (u - w)).sum(-1)


def _sequence_ids(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, int]:
    """The sequence number of every token, and how many sequences there are."""
    if cu_seqlens is None:
        rows = mask.numel() // mask.shape[-1]
        return torch.arange(rows).repeat_interleave(mask.shape[-1]).view(mask.shape), rows
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths), len(lengths)


def _per_sequence_sum(x: Tensor, ids: Tensor, count: int) -> Tensor:
    return x.new_zeros(count).index_add(0, ids.flatten(), x.flatten())


def aggregate(
    per_token: Tensor, mask: Tensor, aggregation: str, cu_seqlens: Tensor | None, denominator: float | None
) -> Tensor:
    """The loss of per-token losses."""
    per_token = per_token.masked_fill(~mask, 0.0)
    if aggregation == "token-mean":
        return per_token.sum() / (mask.sum().clamp(min=1) if denominator is None else denominator)
    ids, count = _sequence_ids(mask, cu_seqlens)
    sums = _per_sequence_sum(per_token, ids, count)
    lengths = _per_sequence_sum(mask.to(sums.dtype), ids, count)
    if aggregation == "seq-mean-token-mean":
        sums = sums / lengths.clamp(min=1)
    return sums.sum() / ((lengths > 0).sum().clamp(min=1) if denominator is None else denominator)


def _log_ratio(logprobs: Tensor, old: Tensor, mask: Tensor, cu_seqlens: Tensor | None, ratio: str) -> Tensor:
    raw = (logprobs - old).masked_fill(~mask, 0.0)
    if ratio == "token":
        return raw.clamp(-20, 20)
    ids, count = _sequence_ids(mask, cu_seqlens)
    lengths = _per_sequence_sum(mask.to(raw.dtype), ids, count).clamp(min=1)
    return (_per_sequence_sum(raw, ids, count) / lengths).clamp(-20, 20)[ids]


def _estimate(logprobs: Tensor, ref: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return logprobs - ref
    if estimator == "k2":
        return (logprobs - ref).square() / 2
    difference = (ref - logprobs).clamp(-20, 20)
    return difference.exp() - 1 - difference


def policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    config: PolicyLossConfig,
    ref_logprobs: Tensor | None = None,
    ref_logits: Tensor | None = None,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    denominator: float | None = None,
) -> Tensor:
    """The loss alone; inputs as in :func:`ppo_fast.policy_loss`, finite everywhere."""
    logprobs, entropy, kl = token_stats(logits, targets, ref_logits, config.temperature)
    old = logprobs.detach() if old_logprobs is None else old_logprobs
    log_r = _log_ratio(logprobs, old, mask, cu_seqlens, config.ratio)
    r = log_r.exp()
    low = 0.0 if config.clip_low is None else 1 - config.clip_low
    high = None if config.clip_high is None else 1 + config.clip_high
    if config.objective == "cispo":
        objective = r.clamp(low, high).detach() * advantages * logprobs
    else:
        objective = torch.minimum(r * advantages, r.clamp(low, high) * advantages)
    if config.dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, config.dual_clip * advantages), objective)
    loss = -objective if importance_weights is None else -importance_weights * objective
    loss = loss + config.penalty_coef * (r - 1 - log_r) - config.ent_coef * entropy
    if ref_logprobs is not None:
        kl = _estimate(logprobs, ref_logprobs, config.kl_estimator)
    if kl is not None:
        loss = loss + config.kl_coef * kl
    return aggregate(loss, mask, config.aggregation, cu_seqlens, denominator)


def value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    old_values: Tensor | None = None,
    clip: float | None = None,
    aggregation: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    denominator: float | None = None,
) -> Tensor:
    """The loss alone; inputs as in :func:`ppo_fast.value_loss`, finite everywhere."""
    values = _upcast(values)
    squares = (values - returns).square()
    if clip is not None and old_values is not None:
        held = torch.clamp(values, old_values - clip, old_values + clip)
        squares = torch.maximum(squares, (held - returns).square())
    return aggregate(squares / 2, mask, aggregation, cu_seqlens, denominator)


def gae(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Advantages and returns of unmasked [B, T] by the loop over time."""
    advantages = torch.zeros_like(rewards)
    running = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * running
        next_value = values[:, t]
        advantages[:, t] = running
    return advantages, advantages + values
