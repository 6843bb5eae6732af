"""Advantages and the losses of an update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ppo_fast.ops import PolicyLossConfig
from ppo_fast.rlhf.config.base import Settings
from ppo_fast.rlhf.errors import UserError, check, not_negative, positive


@dataclass(frozen=True)
class AdvantageConfig(Settings):
    """Per token by generalized advantage estimation, or one for the whole response, with a value model or without."""

    GROUP = "advantage"

    # sequence: return - value of the prompt, on every token; group: return - mean of the prompt's samples, no critic.
    kind: Literal["gae", "sequence", "group"] = "gae"  # gae: per token, by lam; the others: one for each response
    gamma: float = 1.0  # discount
    lam: float | Literal["adaptive"] = 0.95  # 0: TD error, 1: return minus value; adaptive: by each response's length
    lam_alpha: float = 0.05  # adaptive: lam = 1 - 1 / (lam_alpha * length), at least 0
    value_lam: float | None = None  # lam of the value model's targets; 1: the returns themselves; null: lam
    whiten: bool | None = None  # mean 0, variance 1 over the rollout batch's counted tokens; null: true, group: false
    leave_one_out: bool = False  # group: the mean of the other samples (RLOO)
    divide_by_std: bool = False  # group: in units of the samples' deviation (GRPO)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.gamma <= 1, "advantage.gamma", "0 <= gamma <= 1", self.gamma)
        known = self.lam == "adaptive" or (not isinstance(self.lam, str) and 0 <= self.lam <= 1)
        check(known, "advantage.lam", "0 <= lam <= 1 or 'adaptive'", self.lam)
        positive("advantage.lam_alpha", self.lam_alpha)
        if self.value_lam is not None:
            check(0 <= self.value_lam <= 1, "advantage.value_lam", "0 <= value_lam <= 1 or null", self.value_lam)
        for name in ("leave_one_out", "divide_by_std"):
            on = getattr(self, name)
            check(self.kind == "group" or not on, f"advantage.{name}", "false without advantage.kind 'group'", on)

    @property
    def critic(self) -> bool:
        """There is a value model."""
        return self.kind != "group"

    @property
    def whitened(self) -> bool:
        """Whitening would lift the 0 of samples that agree: a group has none by default."""
        return self.critic if self.whiten is None else self.whiten


@dataclass(frozen=True)
class LossConfig(Settings):
    """The objective of the update; the meaning of the fields is that of `ppo_fast.PolicyLossConfig`."""

    GROUP = "loss"

    objective: Literal["clip", "cispo"] = "clip"  # cispo: clip(r) * A * logprob, no gradient through the ratio
    clip_low: float | None = 0.2  # ratio lower bound 1 - clip_low; null: open
    clip_high: float | None = 0.2  # ratio upper bound 1 + clip_high; null: open
    dual_clip: float | None = None  # c > 1: bound c * A on the objective where A < 0; null with cispo
    ratio: Literal["token", "sequence"] = "token"  # sequence: one length-normalized ratio per response
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"  # over a minibatch
    ent_coef: float = 0.0  # entropy bonus
    penalty_coef: float = 0.0  # PPO-penalty: coefficient of KL(old policy || policy)
    penalty_target: float | None = None  # nats per token: adapt penalty_coef by factors of 2; null: fixed
    vf_coef: float = 0.5  # weight of the value loss
    value_clip: float | None = 0.2  # new values stay within +-value_clip of the old ones; null: plain

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("loss.vf_coef", self.vf_coef)
        if self.value_clip is not None:
            positive("loss.value_clip", self.value_clip)
        if self.penalty_target is not None:
            positive("loss.penalty_target", self.penalty_target)
            positive("loss.penalty_coef", self.penalty_coef)
        try:
            self.policy_loss()
        except ValueError as error:
            raise UserError(f"loss: {error}") from error

    def policy_loss(self, **others: Any) -> PolicyLossConfig:
        """The config of the policy op; `others` are the fields that come from elsewhere or change in time."""
        bounds = ("objective", "clip_low", "clip_high", "dual_clip", "ratio")
        fields: dict[str, Any] = {
            name: getattr(self, name) for name in (*bounds, "aggregation", "ent_coef", "penalty_coef")
        }
        return PolicyLossConfig(**(fields | others))
