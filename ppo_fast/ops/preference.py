"""Losses of preference pairs, in plain torch: Bradley-Terry for reward models, and DPO. One number per sequence."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppo_fast.ops._core import checks
from ppo_fast.ops._core.results import LossOutput


def preference_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | None = None) -> LossOutput:
    """Negative log-likelihood of the preferences under the Bradley-Terry model.

    ``mean(-logsigmoid(chosen - rejected - margin))``

    Args:
        chosen_scores: [B] (any shape), float32, bfloat16, float16 or float64: scores of the preferred responses.
        rejected_scores: the shape of ``chosen_scores``.
        margin: the shape of ``chosen_scores``, without gradient: how far apart a pair should be; None: 0.

    Returns:
        LossOutput with metrics accuracy (share of pairs with chosen > rejected) and margin (mean of chosen -
        rejected); ``per_token`` is None. float32 (float64 for float64 scores). No pairs: 0 everywhere.

    Raises:
        ValueError: dtypes, shapes or devices that do not fit.

    Example:
        >>> import torch
        >>> out = preference_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
        >>> round(out.loss.item(), 4), out.metrics["accuracy"].item(), out.metrics["margin"].item()
        (0.5032, 0.5, 0.5)

    Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1; margin: Touvron et al. 2023, arXiv:2307.09288, equation 2.
    """
    chosen, rejected = _matched("preference_loss", chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    checks.per_token("preference_loss", "margin", margin, "chosen_scores", chosen_scores, chosen_scores.shape)
    gap = chosen - rejected
    wanted = gap if margin is None else gap - margin.detach().to(gap.dtype)
    return LossOutput(_mean(-logsigmoid(wanted)), _metrics(gap))


def dpo_loss(
    logprobs_chosen: Tensor,
    logprobs_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
) -> LossOutput:
    """Direct preference optimization, on log-probabilities summed over each response.

    ``mean(-logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))))``

    Args:
        logprobs_chosen: [B] (any shape), float32, bfloat16, float16 or float64, nats: the policy's
            log-probabilities of the preferred responses.
        logprobs_rejected: the shape of ``logprobs_chosen``.
        ref_chosen: the same under the reference, without gradient.
        ref_rejected: the same under the reference, without gradient.
        beta: > 0, the strength of the implied KL penalty.

    Returns:
        LossOutput with metrics accuracy, margin, reward_chosen and reward_rejected, where the reward of a response is
        beta * (logprob - ref): means, accuracy being the share of pairs whose chosen reward is the larger.
        ``per_token`` is None. float32 (float64 for float64 log-probabilities). No pairs: 0 everywhere.

    Raises:
        ValueError: dtypes, shapes, devices or a beta that does not fit.

    Example:
        >>> import torch
        >>> zero = torch.zeros(1)
        >>> out = dpo_loss(torch.tensor([5.0]), zero, zero, zero, beta=0.2)
        >>> round(out.loss.item(), 4), out.metrics["reward_chosen"].item()
        (0.3133, 1.0)

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """
    checks.positive("dpo_loss", "beta", beta)
    chosen, rejected, old_chosen, old_rejected = _matched(
        "dpo_loss",
        logprobs_chosen=logprobs_chosen,
        logprobs_rejected=logprobs_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    reward_chosen = beta * (chosen - old_chosen.detach())
    reward_rejected = beta * (rejected - old_rejected.detach())
    gap = reward_chosen - reward_rejected
    rewards = {"reward_chosen": _mean(reward_chosen).detach(), "reward_rejected": _mean(reward_rejected).detach()}
    return LossOutput(_mean(-logsigmoid(gap)), _metrics(gap) | rewards)


def _matched(op: str, **tensors: Tensor) -> list[Tensor]:
    """The tensors, alike in shape and device, in the accumulation dtype of all of them."""
    (first_name, first), *others = tensors.items()
    checks.floating(op, first_name, first)
    for name, value in others:
        checks.tensor(op, name, value)
        checks.per_token(op, name, value, first_name, first, first.shape)
    double = any(value.dtype == torch.float64 for value in tensors.values())
    return [value.to(torch.float64 if double else torch.float32) for value in tensors.values()]


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)


def _metrics(gap: Tensor) -> dict[str, Tensor]:
    gap = gap.detach()
    return {"accuracy": _mean((gap > 0).to(gap.dtype)), "margin": _mean(gap)}
