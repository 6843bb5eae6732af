"""The metrics of an update, collected on the device and moved to the host in one transfer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.ppo.advantages import Experience, agreeing
from ppo_fast.rlhf.ppo.correction import mismatch_metrics
from ppo_fast.rlhf.ppo.rewards import OwnScores, Rewards
from ppo_fast.rlhf.ppo.rollout import Rollout
from ppo_fast.rlhf.ppo.update import UpdateStats
from ppo_fast.rlhf.training.finite import check_metrics
from ppo_fast.rlhf.training.runtime import Stopwatch
from ppo_fast.rlhf.training.utilization import matrix_weights, training_work

NGRAM = 3  # of hacking/repetition and hacking/distinct_n


def collect(
    rollout: Rollout,
    rewards: Rewards,
    experience: Experience,
    stats: UpdateStats,
    config: PPOConfig,
    watch: Stopwatch,
) -> dict[str, float]:
    """Return every metric of one update by name; `watch` has timed its phases.

    Raises UserError naming the metric when one is not finite.
    """
    tensors = (
        _objective(rollout, rewards)
        | _update(stats, config)
        | _lengths(rollout, rewards)
        | (_value(experience, stats) if stats.value else {})
        | _groups(rollout, rewards)
        | mismatch_metrics(rollout, config.rollout)
        | ({} if rewards.std is None else {"hacking/ensemble_std": rewards.std.mean()})
    )
    numbers = torch.stack([value.double() for value in tensors.values()]).tolist()
    metrics = dict(zip(tensors, numbers, strict=True))
    check_metrics(metrics)
    metrics |= _repetition(rewards.completion_ids)
    metrics |= {
        "lr": stats.lr,
        "filter/rejected": float(rewards.verdicts.count(False)),
        "filter/masked": float(config.rollout.batch_size - len(rewards.verdicts)),
        "nan/skipped_steps": float(stats.skipped),
        "memory/peak": watch.peak(),
    }
    if stats.empty:
        metrics["policy/empty_minibatches"] = float(stats.empty)
    if stats.loss_scale is not None:
        metrics |= {"float16/loss_scale": stats.loss_scale, "float16/skipped_steps": float(stats.overflows)}
    return metrics | _speed(watch.seconds, tokens=len(rollout.tokens))


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """Return 1 - var(returns - values) / var(returns) over tokens [N]; 0 where the returns do not vary."""
    total = returns.var(correction=0)
    rest = (returns - values).var(correction=0)
    return torch.where(total > 0, 1 - rest / total.clamp_min(1e-30), 0.0)


def _objective(rollout: Rollout, rewards: Rewards) -> dict[str, Tensor]:
    total = rollout.sums(rewards.rewards)
    difference = (rollout.sampled_logprobs - rollout.logprobs).abs()
    return {
        "objective/kl": rollout.sums(rewards.kl).mean(),
        "objective/entropy": rollout.entropy.mean(),
        "objective/scores": rewards.scores.mean(),
        "objective/rlhf_reward": total.mean(),
        "objective/non_score_reward": (total - rewards.scores).mean(),
        "objective/kl_coef": rewards.kl_coef,
        **_own_scores(rewards.own),
        "rollout/logprob_diff_max": difference.max(),
        "rollout/logprob_diff_mean": difference.mean(),
    }


def _own_scores(own: OwnScores) -> dict[str, Tensor]:
    """Return mean and deviation of what the sources gave, of each and combined, before clip and penalties."""
    scores = {"": own.combined} | {f"{name}/": own.sources[:, index] for index, name in enumerate(own.names)}
    return {
        f"reward/{prefix}{kind}": number
        for prefix, values in scores.items()
        for kind, number in (("mean", values.mean()), ("std", values.std(correction=0)))
    }


def _value(experience: Experience, stats: UpdateStats) -> dict[str, Tensor]:
    return {
        "value/explained_variance": explained_variance(experience.values, experience.returns),
        "loss/value": stats.value["value_loss"],
        "value/clipfrac": stats.value["clipfrac"],
        "grad_norm/value": stats.grad_norms[1],
    }


def _groups(rollout: Rollout, rewards: Rewards) -> dict[str, Tensor]:
    """Return the share of prompts whose samples all have one score: they teach nothing where the KL is not a reward."""
    groups = rollout.generation.prompts.groups
    return {} if groups is None else {"group/agree": agreeing(rewards.scores, groups).float().mean()}


def _update(stats: UpdateStats, config: PPOConfig) -> dict[str, Tensor]:
    value = config.loss.vf_coef * stats.value["value_loss"] if stats.value else 0.0
    return {
        "policy/approxkl": stats.policy["approx_kl"],
        "policy/clipfrac": stats.policy["clipfrac"],
        "policy/dual_clipfrac": stats.policy["dual_clipfrac"],
        "policy/ratio_mean": stats.policy["ratio_mean"],
        "policy/ratio_max": stats.policy["ratio_max"],
        "policy/entropy": stats.policy["entropy"],
        "loss/policy": stats.policy["policy_loss"],
        "loss/total": stats.policy["loss"] + value,
        "grad_norm/policy": stats.grad_norms[0],
    }


def _lengths(rollout: Rollout, rewards: Rewards) -> dict[str, Tensor]:
    lengths = rollout.cu_seqlens.diff().float()
    deviations = torch.stack([lengths - lengths.mean(), rewards.scores - rewards.scores.mean()])
    scale = deviations.norm(dim=1).prod()
    covariance = deviations.prod(dim=0).sum()
    return {
        "length/mean": lengths.mean(),
        "length/max": lengths.max(),
        "length/truncated_frac": (~rollout.generation.ended).float().mean(),
        "hacking/length_reward_corr": torch.where(scale > 0, covariance / scale.clamp_min(1e-30), 0.0),
    }


def phase_work(models: Models) -> dict[str, float]:
    """Return the operations of each phase on one token of a prompt or response; of the update, in one epoch."""
    policy, reference = matrix_weights(models.policy), matrix_weights(models.reference)
    apart = [] if models.value is None or models.shared else [models.value]
    update = sum(training_work(network) for network in (models.policy, *apart))
    scoring = 2 * (policy + reference + sum(matrix_weights(each) for each in apart))
    return {"rollout": 2 * policy, "logprobs": scoring, "update": update}


def _speed(seconds: dict[str, float], tokens: float) -> dict[str, float]:
    """Return seconds, share of the whole and response tokens per second of every phase, and of all together."""
    whole = max(sum(seconds.values()), 1e-9)
    speed = {"tokens_per_second": tokens / whole}
    for phase, value in seconds.items():
        speed[f"time/{phase}"] = value
        speed[f"time/{phase}_share"] = value / whole
        speed[f"tokens_per_second/{phase}"] = tokens / max(value, 1e-9)
    return speed


def _repetition(completion_ids: list[list[int]]) -> dict[str, float]:
    """Return the share of n-grams repeated in their response, and of distinct n-grams in the whole batch."""
    per_response = [Counter(_ngrams(ids)) for ids in completion_ids]
    total = sum(map(sum, (counts.values() for counts in per_response))) or 1
    distinct = len(set().union(*per_response))
    return {
        "hacking/repetition": 1 - sum(map(len, per_response)) / total,
        "hacking/distinct_n": distinct / total,
    }


def _ngrams(ids: list[int]) -> Iterable[tuple[int, ...]]:
    return zip(*(ids[start:] for start in range(NGRAM)), strict=False)
