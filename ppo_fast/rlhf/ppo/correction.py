"""Importance weights for tokens that another distribution sampled than the one that is trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ppo_fast.rlhf.config.ppo import RolloutConfig
from ppo_fast.rlhf.errors import BatchError
from ppo_fast.rlhf.ppo.rollout import Rollout

_LARGEST = 20.0  # of |log w|, as in the ratio of `policy_loss`


@dataclass(frozen=True)
class Correction:
    """The weights of the N tokens of a rollout in the policy loss."""

    weights: Tensor  # [N] float32, w = pi_train / pi_sampled of each token, or of its response; truncated
    kept: Tensor | None  # [N] bool, False: left out of the update; None: all are kept


def make_correction(rollout: Rollout, config: RolloutConfig) -> Correction | None:
    """Return the weights that make the expected gradient that of samples from the trained policy; None: no correction.

    With w = exp(logprob - sampled logprob) of a token, or the product of these over its response: `truncate` takes
    min(w, cap), which bounds the variance; `mask` leaves out tokens with w outside the band. A token that is left out
    has no part in policy loss, value loss, their denominators and metrics, or whitening. Its reward and value still
    enter the advantages of the tokens before it, and all metrics of the rollout count it.

    Sources: Ionides 2008, "Truncated importance sampling", and Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training", for weights between engines; masking as in IcePop (Ling Team 2025).

    Raises BatchError when no token is left.
    """
    if config.correction in (None, "none"):
        return None
    weights = _weights(rollout, config)
    if config.correction == "truncate":
        return Correction(weights.clamp_max(config.correction_cap), None)
    kept = ~_clipped(weights, config)
    if not kept.any():
        band = [*config.correction_band]
        raise BatchError(
            f"rollout.correction: expected a token or more with a weight in the band {band}, got none of {len(kept)}"
        )
    return Correction(weights, kept)


def mismatch_metrics(rollout: Rollout, config: RolloutConfig) -> dict[str, Tensor]:
    """Return KL(sampled || trained) per token, the largest weight and the share of tokens that the correction changes.

    The KL is the mean of w - 1 - log w over the tokens, which is unbiased and not negative.
    """
    if config.correction in (None, "none"):
        return {}
    log_ratio = (rollout.logprobs - rollout.sampled_logprobs).clamp(-_LARGEST, _LARGEST)
    weights = _weights(rollout, config)
    return {
        "mismatch/kl": (log_ratio.expm1() - log_ratio).mean(),
        "mismatch/max": weights.max(),
        "mismatch/clipped_frac": _clipped(weights, config).float().mean(),
    }


def _weights(rollout: Rollout, config: RolloutConfig) -> Tensor:
    """Return w [N] before truncation."""
    log_ratio = rollout.logprobs - rollout.sampled_logprobs
    if config.correction_level == "sequence":
        log_ratio = rollout.sums(log_ratio).repeat_interleave(rollout.cu_seqlens.diff(), output_size=len(log_ratio))
    return log_ratio.clamp(-_LARGEST, _LARGEST).exp()


def _clipped(weights: Tensor, config: RolloutConfig) -> Tensor:
    if config.correction == "truncate":
        return weights > config.correction_cap
    low, high = config.correction_band
    return torch.logical_or(weights < low, weights > high)
