"""The only place where parameters change: epochs of clipped policy and value updates over one rollout batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_fast import ops

from .advantages import Targets
from .config import PPOConfig
from .errors import NotFiniteError
from .forward import response_loss
from .models import Models, response_values
from .optim import Network, PenaltyCoefficient, schedule
from .rollout import Rollout, alike, used_columns

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

    def rows(self, index: Tensor) -> Minibatch:
        """The rows at `index`."""
        return Minibatch(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def split(self, size: int) -> Iterator[Minibatch]:
        """Micro-batches of `size` rows of like length, without the columns that are padding in all of them."""
        for rows in alike(self.attention_mask, size):
            both, response = used_columns(self.attention_mask[rows], self.mask[rows])
            part = self.rows(rows)
            columns = {name: both if name in ("input_ids", "attention_mask") else response for name in vars(part)}
            yield Minibatch(**{name: getattr(part, name)[:, used] for name, used in columns.items()})


@dataclass(frozen=True)
class UpdateStats:
    """What the update of one rollout batch did; the metrics are 0-d float32 tensors on the device."""

    policy: Metrics  # metrics of `policy_loss` and "loss", combined over all optimizer steps
    value: Metrics  # metrics of `value_loss`, the same
    grad_norms: Tensor  # [2] float32: policy, value; before clipping, mean over the optimizer steps; 0: no step
    lr: float  # of the policy at the last step
    note: str | None  # why the epochs stopped early, or which steps were skipped
    skipped: int = 0  # optimizer steps left out because a number was not finite


@dataclass(frozen=True)
class Step:
    """One minibatch, by its numbers; all on the device."""

    epoch: int  # from 0
    number: int  # of the minibatch in its epoch, from 0
    rows: Tensor  # [b] int64: rows of the rollout batch
    policy: Metrics
    value: Metrics
    norms: Tensor  # [2] float32: gradient norms of policy and value before clipping
    taken: bool  # False: target_kl stopped the epochs here

    def checked(self) -> dict[str, Tensor]:
        """What must be finite for the step to be taken, 0-d each, by the name of its metric."""
        return {
            "loss/policy": self.policy["policy_loss"],
            "loss/value": self.value["value_loss"],
            "loss/total": self.policy["loss"],
            "policy/approxkl": self.policy["approx_kl"],
            "policy/ratio_max": self.policy["ratio_max"],
            "grad_norm/policy": self.norms[0],
            "grad_norm/value": self.norms[1],
        }


class Learner:
    """The trained networks with their optimizers and the steps taken so far."""

    def __init__(self, models: Models, config: PPOConfig) -> None:
        self.models, self.config = models, config
        self.policy = Network(models.trained("policy"), config.optim.lr, config.optim)
        self.value = Network(models.trained("value"), config.optim.value_lr, config.optim)
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
        """Train on one rollout batch; `index` counts the updates from 0 and sets the learning rate.

        A step with a number that is not finite changes nothing. With on_nan = "skip" it is left out and counted;
        else, or when no step is left, NotFiniteError tells the first one, and no later step changes anything either.
        """
        whole, steps = Minibatch.whole(rollout, targets), list[Step]()
        first = index * self.config.optim.epochs * self.config.steps_per_epoch
        stop = self.config.on_nan == "stop"
        failed = torch.zeros((), dtype=torch.bool, device=rollout.mask.device)
        lr_factor, note = 0.0, None
        for epoch, number, rows in self._minibatches(len(whole.mask), generator):
            policy, value = self.backward(whole.rows(rows), kl_coef)
            note = self._stop_note(policy["approx_kl"], epoch)
            norm = torch.stack([self.policy.clip(), self.value.clip()])
            steps.append(Step(epoch, number, rows, policy, value, norm, taken=note is None))
            if note is not None:
                self._discard_gradients()
                break
            not_finite = ~torch.stack([*steps[-1].checked().values()]).isfinite().all()
            failed = failed | not_finite if stop else not_finite
            lr_factor = schedule(first + len(steps) - 1, self.steps, self.config.optim)
            self.policy.step(lr_factor, failed)
            self.value.step(lr_factor, failed)
        good, skipped = finite_steps(steps, stop=stop)
        norms = [step.norms for step in good if step.taken]
        self.penalty.update(combine([step.policy for step in good if step.epoch == good[-1].epoch])["approx_kl"])
        return UpdateStats(
            policy=combine([step.policy for step in good]),
            value=combine([step.value for step in good]),
            grad_norms=torch.stack(norms).mean(dim=0) if norms else torch.zeros(2, device=rollout.mask.device),
            lr=self.config.optim.lr * lr_factor,
            note="; ".join(filter(None, [note, *skipped])) or None,
            skipped=len(skipped),
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
        settings: dict[str, Any] = {
            "penalty_coef": self.penalty.coef,
            "temperature": self.config.rollout.temperature,
        }
        reference: dict[str, Any] = {}
        if self.config.kl.in_loss:
            settings |= {"kl_coef": kl_coef, "kl_estimator": self.config.kl.loss_estimator}
            if self.config.kl.loss_estimator == "full":
                reference["reference"] = self.models.reference
            else:
                reference["ref_logprobs"] = micro.ref_logprobs
        output = response_loss(
            self.models.policy,
            (micro.input_ids, micro.attention_mask, micro.mask.shape[1]),
            micro.responses,
            micro.logprobs,
            micro.advantages,
            micro.mask,
            config=self.config.loss.policy_loss(**settings),
            linear=self.models.linear,
            denominator=count,
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

    def _minibatches(self, size: int, generator: torch.Generator) -> Iterator[tuple[int, int, Tensor]]:
        """(epoch, number in it, rows of the minibatch), in a new order every epoch."""
        for epoch in range(self.config.optim.epochs):
            order = torch.randperm(size, generator=generator, device=generator.device)
            for number, rows in enumerate(order.split(self.config.optim.minibatch_size)):
                yield epoch, number, rows

    def state_dict(self) -> dict[str, Any]:
        """Optimizers and penalty coefficient; the weights are the models' own."""
        return {name: getattr(self, name).state_dict() for name in ("policy", "value", "penalty")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

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


def finite_steps(steps: list[Step], *, stop: bool) -> tuple[list[Step], list[str]]:
    """The steps whose numbers are all finite, and a remark on each other; one read from the device for all.

    NotFiniteError for the first that is not when `stop`, or when no step is left.
    """
    values = torch.stack([torch.stack([*step.checked().values()]) for step in steps]).tolist()
    good, remarks, first = [], [], None
    for step, numbers in zip(steps, values, strict=True):
        found = [(name, x) for name, x in zip(step.checked(), numbers, strict=True) if not math.isfinite(x)]
        if not found:
            good.append(step)
            continue
        told = "epoch {}, minibatch {}: {} is not finite: {}".format(step.epoch + 1, step.number + 1, *found[0])
        first = first or NotFiniteError(told, step.rows.tolist())
        remarks.append(f"skipped {told}")
    if first is not None and (stop or not good):
        raise first
    return good, remarks


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
