"""The only place where parameters change: epochs of clipped policy and value updates over one rollout batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast import ops

from .advantages import Targets
from .config import AdamWConfig, LossConfig, PPOConfig
from .models import Models, response_logits, response_values
from .rollout import Rollout

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Minibatch:
    """Rows of a rollout and its targets."""

    input_ids: Tensor  # [B, L] int64
    attention_mask: Tensor  # [B, L] bool
    responses: Tensor  # [B, T] int64
    mask: Tensor  # [B, T] bool
    logprobs: Tensor  # [B, T] float32: old
    ref_logprobs: Tensor  # [B, T] float32
    values: Tensor  # [B, T] float32: old
    advantages: Tensor  # [B, T] float32
    returns: Tensor  # [B, T] float32

    @classmethod
    def whole(cls, rollout: Rollout, targets: Targets) -> Minibatch:
        """All rows of the rollout."""
        return cls(
            input_ids=rollout.generation.input_ids,
            attention_mask=rollout.generation.attention_mask,
            responses=rollout.generation.responses,
            mask=rollout.mask,
            logprobs=rollout.logprobs,
            ref_logprobs=rollout.ref_logprobs,
            values=rollout.values,
            advantages=targets.advantages,
            returns=targets.returns,
        )

    def rows(self, index: Tensor | slice) -> Minibatch:
        """The rows at `index`."""
        return Minibatch(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def split(self, size: int) -> Iterator[Minibatch]:
        """Consecutive micro-batches of `size` rows."""
        for start in range(0, len(self.mask), size):
            yield self.rows(slice(start, start + size))


@dataclass(frozen=True)
class UpdateStats:
    """What the update of one rollout batch did; the metrics are 0-d float32 tensors on the device."""

    policy: Metrics  # metrics of `policy_loss` and "loss", combined over all optimizer steps
    value: Metrics  # metrics of `value_loss`, the same
    grad_norms: Tensor  # [2] float32: policy, value; before clipping, mean over the optimizer steps; 0: no step
    lr: float  # of the policy at the last step
    note: str | None  # why the epochs stopped early


class Network:
    """A trained module with its own AdamW and its own gradient-norm clip."""

    def __init__(self, module: nn.Module, lr: float, config: AdamWConfig) -> None:
        self.config, self.lr = config, lr
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, lr_factor: float) -> Tensor:
        """Clip, step, clear; returns the 0-d gradient norm from before the clip."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


class PenaltyCoefficient:
    """penalty_coef, fixed or adapted: x2 above 1.5 x target, /2 below target / 1.5, by the mean KL(old || new).

    Source: Schulman et al. 2017, arXiv:1707.06347, section 4.
    """

    def __init__(self, config: LossConfig, device: torch.device) -> None:
        self.target = config.penalty_target
        self.coef: float | Tensor = config.penalty_coef
        if self.target is not None:
            self.coef = torch.tensor(config.penalty_coef, dtype=torch.float32, device=device)

    def update(self, approx_kl: Tensor) -> None:
        """Adapt by the 0-d mean KL per token of the last epoch."""
        if self.target is not None:
            up, down = approx_kl > 1.5 * self.target, approx_kl < self.target / 1.5
            self.coef = self.coef * torch.where(up, 2.0, torch.where(down, 0.5, 1.0))


class Learner:
    """The trained networks with their optimizers and the steps taken so far."""

    def __init__(self, models: Models, config: PPOConfig) -> None:
        self.models, self.config = models, config
        self.policy = Network(models.policy, config.optim.lr, config.optim)
        self.value = Network(models.value, config.optim.value_lr, config.optim)
        self.penalty = PenaltyCoefficient(config.loss, models.device)
        self.steps = config.updates * config.optim.epochs * config.steps_per_epoch

    def update(
        self,
        rollout: Rollout,
        targets: Targets,
        kl_coef: float | Tensor,
        index: int,
        generator: torch.Generator,
    ) -> UpdateStats:
        """Train on one rollout batch; `index` counts the updates from 0 and sets the learning rate."""
        first = index * self.config.optim.epochs * self.config.steps_per_epoch
        epochs: list[list[Metrics]] = [[] for _ in range(self.config.optim.epochs)]
        value: list[Metrics] = []
        norms: list[Tensor] = []
        lr_factor, note = 0.0, None
        for number, minibatch in self._minibatches(Minibatch.whole(rollout, targets), generator):
            policy_metrics, value_metrics = self.backward(minibatch, kl_coef)
            epochs[number].append(policy_metrics)
            value.append(value_metrics)
            note = self._stop_note(policy_metrics["approx_kl"], number)
            if note is not None:
                self._discard_gradients()
                break
            lr_factor = schedule(first + len(norms), self.steps, self.config.optim)
            norms.append(torch.stack([self.policy.step(lr_factor), self.value.step(lr_factor)]))
        last_epoch = next(epoch for epoch in reversed(epochs) if epoch)
        self.penalty.update(combine(last_epoch)["approx_kl"])
        return UpdateStats(
            policy=combine([metrics for epoch in epochs for metrics in epoch]),
            value=combine(value),
            grad_norms=torch.stack(norms).mean(dim=0) if norms else torch.zeros(2, device=rollout.mask.device),
            lr=self.config.optim.lr * lr_factor,
            note=note,
        )

    def backward(self, batch: Minibatch, kl_coef: float | Tensor) -> tuple[Metrics, Metrics]:
        """Accumulate the gradients of one minibatch, micro-batch by micro-batch, under one normaliser."""
        tokens = batch.mask.sum()
        by_token = self.config.loss.aggregation == "token-mean"
        count = tokens if by_token else batch.mask.any(dim=1).sum()
        policy, value = [], []
        for micro in batch.split(self.config.optim.micro_batch_size or len(batch.mask)):
            policy.append(self._policy_backward(micro, kl_coef, count))
            value.append(self._value_backward(micro, tokens))
        return combine(policy, losses=torch.sum), combine(value, losses=torch.sum)

    def _policy_backward(self, micro: Minibatch, kl_coef: float | Tensor, count: Tensor) -> Metrics:
        inputs = (micro.input_ids, micro.attention_mask, micro.mask.shape[1])
        settings: dict[str, Any] = {
            "penalty_coef": self.penalty.coef,
            "temperature": self.config.rollout.temperature,
        }
        reference: dict[str, Any] = {}
        if self.config.kl.in_loss:
            settings |= {"kl_coef": kl_coef, "kl_estimator": self.config.kl.loss_estimator}
            if self.config.kl.loss_estimator == "full":
                with torch.no_grad():
                    reference["ref_logits"] = response_logits(self.models.reference, *inputs)
            else:
                reference["ref_logprobs"] = micro.ref_logprobs
        output = ops.policy_loss(
            response_logits(self.models.policy, *inputs),
            micro.responses,
            micro.logprobs,
            micro.advantages,
            micro.mask,
            config=self.config.loss.policy_loss(**settings),
            denominator=count,
            inplace=True,
            **reference,
        )
        output.loss.backward()
        return output.metrics | {"loss": output.loss.detach()}

    def _value_backward(self, micro: Minibatch, count: Tensor) -> Metrics:
        output = ops.value_loss(
            response_values(self.models.value, micro.input_ids, micro.attention_mask, micro.mask.shape[1]),
            micro.returns,
            micro.mask,
            old_values=micro.values,
            clip=self.config.loss.value_clip,
            denominator=count,
        )
        (self.config.loss.vf_coef * output.loss).backward()
        return output.metrics

    def _minibatches(self, batch: Minibatch, generator: torch.Generator) -> Iterator[tuple[int, Minibatch]]:
        """(epoch, minibatch) in a new order every epoch."""
        for epoch in range(self.config.optim.epochs):
            order = torch.randperm(len(batch.mask), generator=generator, device=generator.device)
            for rows in order.split(self.config.optim.minibatch_size):
                yield epoch, batch.rows(rows)

    def _discard_gradients(self) -> None:
        self.policy.optimizer.zero_grad()
        self.value.optimizer.zero_grad()

    def _stop_note(self, approx_kl: Tensor, epoch: int) -> str | None:
        """Reads one number from the device per minibatch, and only when target_kl is set."""
        target = self.config.optim.target_kl
        if target is None or not approx_kl > target:
            return None
        reason = f"approx_kl {approx_kl.item():.4f} > target_kl {target}"
        return f"stopped in epoch {epoch + 1} of {self.config.optim.epochs}: {reason}"


def schedule(step: int, total: int, config: AdamWConfig) -> float:
    """Learning-rate factor of step `step` (from 0) of `total`: linear warm-up, then linear to `final_lr_frac`."""
    warmup = math.ceil(config.warmup_frac * total)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - (1 - config.final_lr_frac) * (step - warmup) / max(1, total - warmup)


def combine(parts: list[Metrics], losses: Any = torch.mean) -> Metrics:
    """Join metrics of several batches: means weighted by their `tokens`, maxima by max, losses by `losses`."""
    joined = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    weight = joined["tokens"] / joined["tokens"].sum()

    def join(name: str, values: Tensor) -> Tensor:
        if name == "tokens":
            return values.sum()
        if name.endswith("loss"):
            return losses(values)
        return values.max() if name.endswith("max") else (values * weight).sum()

    return {name: join(name, values) for name, values in joined.items()}
