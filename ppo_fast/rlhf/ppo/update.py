"""Epochs of clipped policy and value updates over one rollout batch; no other module changes parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ppo_fast import ops
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.data.packing import Array, ForwardInputs, offsets, to_device
from ppo_fast.rlhf.errors import NotFiniteError
from ppo_fast.rlhf.models.forward import (
    head_loss,
    head_values,
    reference_terms,
    response_hidden,
    response_loss,
    response_values,
)
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.ppo.advantages import Experience
from ppo_fast.rlhf.training.loss_scale import LossScale
from ppo_fast.rlhf.training.optim import ClippedOptimizer, InBackwardOptimizer, PenaltyCoefficient, schedule
from ppo_fast.rlhf.training.state import State
from ppo_fast.rlhf.world import World, current

Metrics = dict[str, Tensor]
Terms = dict[str, Any]  # keyword arguments of the loss


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass, of n counted tokens."""

    sequences: ForwardInputs
    cu_seqlens: Tensor  # [b + 1] int64: where each response begins among the n tokens
    tokens: Tensor  # [n] int64
    logprobs: Tensor  # [n] float32: old
    ref_logprobs: Tensor  # [n] float32
    values: Tensor  # [n] float32: old
    advantages: Tensor  # [n] float32
    returns: Tensor  # [n] float32
    weights: Tensor | None = None  # [n] float32: importance weights of the policy loss; None: 1

    @classmethod
    def from_experience(cls, experience: Experience, rows: Array, *, packed: bool) -> MicroBatch:
        """Return these responses without the padding that all of them share."""
        cu_seqlens = to_device(offsets(experience.lengths[rows]), experience.tokens.device)
        return cls(experience.grid.sequences(rows, packed=packed), cu_seqlens, **experience.select(rows))


@dataclass(frozen=True)
class UpdateStats:
    """The result of the update of one rollout batch; the metrics are 0-d float32 tensors on the device."""

    policy: Metrics  # metrics of `policy_loss` and "loss", combined over all optimizer steps
    value: Metrics  # metrics of `value_loss`, the same; none without a value model
    grad_norms: Tensor  # [2] float32: policy, value; before clipping, mean over the optimizer steps; 0: no step
    lr: float  # of the policy at the last step
    note: str | None  # why the epochs stopped early, or which steps were skipped
    skipped: int = 0  # optimizer steps left out because a number was not finite
    overflows: int = 0  # optimizer steps left out because scaled gradients of float16 were not finite
    empty: int = 0  # optimizer steps left out because their minibatch had no counted token
    loss_scale: float | None = None  # after the last step; None: no float16
    passes: float = 0.0  # over the batch: the epochs, fewer where they stopped early


@dataclass(frozen=True)
class Step:
    """One minibatch, by its numbers; all on the device."""

    epoch: int  # from 0
    number: int  # of the minibatch in its epoch, from 0
    rows: list[int]  # of the rollout batch
    policy: Metrics
    value: Metrics
    norms: Tensor  # [2] float32: gradient norms of policy and value before clipping
    taken: bool  # False: target_kl stopped the epochs here, or the gradients overflowed
    overflows: bool = False  # scaled gradients of float16 were not finite

    def checked(self, *, norms: bool = True) -> dict[str, Tensor]:
        """Return the 0-d numbers that must be finite for the step to be taken, by metric."""
        found = {
            "loss/policy": self.policy["policy_loss"],
            **({"loss/value": self.value["value_loss"]} if self.value else {}),
            "loss/total": self.policy["loss"],
            "policy/approxkl": self.policy["approx_kl"],
            "policy/ratio_max": self.policy["ratio_max"],
        }
        return found | ({"grad_norm/policy": self.norms[0], "grad_norm/value": self.norms[1]} if norms else {})


class Learner:
    """The trained networks with their optimizers and the steps taken so far."""

    def __init__(self, models: Models, config: PPOConfig) -> None:
        self.models, self.config = models, config
        kind = InBackwardOptimizer if config.optim.in_backward else ClippedOptimizer
        self.policy = kind(models.trained("policy"), config.optim.lr, config.optim)
        self.value = None  # without a value model
        if models.value is not None:
            self.value = kind(models.trained("value"), config.optim.value_lr, config.optim)
        self.penalty = PenaltyCoefficient(config.loss, models.device)
        self.loss_scale = LossScale(models.policy.dtype, models.device)
        self.kl_coef, self.penalty_coef = torch.zeros(2, dtype=torch.float32, device=models.device)
        self.loss_config = self._loss_config()
        per_update = config.optim.epochs * config.steps_per_epoch
        self.steps, self.warmup = config.updates * per_update, config.optim.critic_warmup_updates * per_update
        self.warming_up = False  # only the value model learns
        self.progress: Callable[[int, int], None] = lambda done, total: None  # is called as optimizer steps begin
        self.repeats = False  # the pass at hand counts 0

    def update(
        self, experience: Experience, kl_coef: float | Tensor, index: int, generator: torch.Generator
    ) -> UpdateStats:
        """Train on one rollout batch; `index` counts the updates from 0 and sets the learning rates.

        While the critic warms up the policy is measured and stays as it is; its schedule begins afterwards.

        A minibatch without a counted token takes no step. A step with a number that is not finite changes nothing.
        With on_nan = "skip" it is skipped and counted; else, or if no step is left, NotFiniteError names the first one,
        and no later step changes anything either.
        Between the first step and the last the host waits for the device only if target_kl is set.
        """
        steps, device = list[Step](), experience.tokens.device
        first = index * self.config.optim.epochs * self.config.steps_per_epoch
        self.warming_up = index < self.config.optim.critic_warmup_updates
        stop = self.config.on_nan == "stop"
        failed = torch.zeros((), dtype=torch.bool, device=device)
        lr_factor, note, empty = 0.0, None, 0
        size, optim = len(experience.lengths), self.config.optim
        for epoch, number, rows in self._minibatches(size, generator):
            step = len(steps) + empty
            self.progress(step + 1, optim.epochs * -(-size // optim.minibatch_size))
            step += first
            if not experience.lengths[rows].any():  # else the moments would decay, and the weights with them
                empty += 1
                continue
            value_factor = schedule(step, self.steps, self.config.optim)
            policy_factor = 0.0
            if not self.warming_up:
                policy_factor = schedule(step - self.warmup, self.steps - self.warmup, self.config.optim)
                self.policy.begin(policy_factor, failed)
            if self.value is not None:
                self.value.begin(value_factor, failed)
            policy, value = self.backward(experience, rows, kl_coef)
            note = self._stop_note(policy["approx_kl"], epoch)
            none, factor = torch.zeros((), dtype=torch.float32, device=device), self.loss_scale.factor
            policy_norm = none if self.warming_up else self.policy.clip(factor)
            norm = torch.stack([policy_norm, none if self.value is None else self.value.clip(factor)])
            steps.append(Step(epoch, number, rows.tolist(), policy, value, norm, taken=note is None))
            if note is not None:
                self._discard_gradients()
                break
            overflows = ~norm.isfinite().all()
            not_finite = ~torch.stack([*steps[-1].checked(norms=not self.loss_scale.enabled).values()]).isfinite().all()
            failed = failed | not_finite if stop else not_finite
            if not self.warming_up:
                lr_factor = policy_factor
                self.policy.step(policy_factor, failed | overflows)
            if self.value is not None:
                self.value.step(value_factor, failed | overflows)
            self.loss_scale.update(norm)
        scaled = self.loss_scale.value if self.loss_scale.enabled else None
        good, skipped = finite_steps(steps, stop=stop, loss_scale=scaled)
        norms = [step.norms for step in good if step.taken]
        if not self.warming_up:
            self.penalty.update(combine([step.policy for step in good if step.epoch == good[-1].epoch])["approx_kl"])
        return UpdateStats(
            policy=combine([step.policy for step in good]),
            value=combine([step.value for step in good]),
            grad_norms=torch.stack(norms).mean(dim=0) if norms else torch.zeros(2, dtype=torch.float32, device=device),
            lr=self.config.optim.lr * lr_factor,
            note="; ".join(filter(None, [note, *skipped])) or None,
            skipped=len(skipped),
            overflows=sum(step.overflows for step in good),
            empty=empty,
            loss_scale=scaled,
            passes=sum(len(step.rows) for step in steps) / len(experience.lengths),
        )

    def backward(self, experience: Experience, rows: Array, kl_coef: float | Tensor) -> tuple[Metrics, Metrics]:
        """Accumulate the gradients of a minibatch of these rows, micro-batch by micro-batch, under one normalizer."""
        lengths = experience.lengths[rows]
        tokens, sequences = max(1, int(lengths.sum())), max(1, int((lengths > 0).sum()))
        count = tokens if self.config.loss.aggregation == "token-mean" else sequences
        run = self._joint_backward if self.models.shared else self._separate_backward
        self.kl_coef.fill_(kl_coef)
        self.penalty_coef.fill_(self.penalty.coef)
        found: list[tuple[Metrics, Metrics]] = []
        optim, packed, world = self.config.optim, self.models.packed, current()
        dealt = experience.grid.deal(rows, world, optim.micro_batch_size, optim.tokens_per_pass, packed=packed)
        for number, part in enumerate(dealt.rows):
            micro = MicroBatch.from_experience(experience, part, packed=packed)
            self.repeats = number >= dealt.counted
            policy, value = run(micro, self._policy_terms(micro, count), tokens)
            found.append((zeros_like(policy), zeros_like(value)) if self.repeats else (policy, value))
        policy, value = (combine(each, losses=torch.sum) for each in zip(*found, strict=True))
        return combined_over_ranks(policy, world), combined_over_ranks(value, world)

    def _backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; 0 of a pass that repeats another for the other ranks' sake."""
        self.loss_scale.scale(loss * 0 if self.repeats else loss).backward()

    def _separate_backward(self, micro: MicroBatch, terms: Terms, tokens: int) -> tuple[Metrics, Metrics]:
        value = {} if self.value is None else self._value_backward(micro, tokens)
        return self._policy_backward(micro, terms), value

    def _policy_backward(self, micro: MicroBatch, terms: Terms) -> Metrics:
        with self.models.running("policy") as run, torch.set_grad_enabled(not self.warming_up):
            loss = run(response_loss, micro.sequences, linear=self.models.linear, **terms)
            if not self.warming_up:
                self._backward(loss.loss)
        return loss.metrics | {"loss": loss.loss.detach()}

    def _value_backward(self, micro: MicroBatch, tokens: int) -> Metrics:
        with self.models.running("value") as run:
            error = run(lambda value: self._value_loss(response_values(value, micro.sequences), micro, tokens))
            self._backward(self.config.loss.vf_coef * error.loss)
        return error.metrics

    def _joint_backward(self, micro: MicroBatch, terms: Terms, tokens: int) -> tuple[Metrics, Metrics]:
        """Run policy and value head on one trunk: one forward pass, one backward pass of the sum.

        While the critic warms up the trunk has no gradient: the loss of the value reaches only the head.
        """
        assert self.models.value is not None  # on this trunk
        head = self.models.value.head

        def losses(policy: PreTrainedModel) -> tuple[ops.LossOutput, ops.LossOutput]:
            with torch.set_grad_enabled(not self.warming_up):
                x = response_hidden(policy, micro.sequences)
                loss = head_loss(x, **terms)
            return loss, self._value_loss(head_values(head, x.hidden), micro, tokens)

        with self.models.running("policy") as run:
            loss, error = run(losses)
            self._backward(loss.loss + self.config.loss.vf_coef * error.loss)
        return loss.metrics | {"loss": loss.loss.detach()}, error.metrics

    def _loss_config(self) -> ops.PolicyLossConfig:
        """Build the options of the loss, once a run: a coefficient that changes is a tensor, which `backward` fills."""
        loss, kl = self.config.loss, self.config.kl
        settings: Terms = {"temperature": self.config.rollout.temperature}
        if loss.penalty_target is not None:
            settings["penalty_coef"] = self.penalty_coef
        if kl.in_loss:
            settings |= {"kl_estimator": kl.loss_estimator}
            settings |= {"kl_coef": self.kl_coef} if kl.adaptive or kl.coef else {}
        return loss.policy_loss(**settings)

    def _policy_terms(self, micro: MicroBatch, count: int) -> Terms:
        """Return the arguments of the policy's loss except its logits."""
        terms: Terms = {"ref_logprobs": micro.ref_logprobs} if self.config.kl.in_loss else {}
        if self.config.kl.in_loss and self.config.kl.loss_estimator == "full":
            with self.models.running("reference") as run, torch.no_grad():
                copied = current().mesh is not None
                terms = run(reference_terms, micro.sequences, linear=self.models.linear, copied=copied)
        return terms | {
            "targets": micro.tokens,
            "old_logprobs": micro.logprobs,
            "advantages": micro.advantages,
            "importance_weights": micro.weights,
            "cu_seqlens": micro.cu_seqlens,
            "denominator": count,
            "config": self.loss_config,
        }

    def _value_loss(self, values: Tensor, micro: MicroBatch, tokens: int) -> ops.LossOutput:
        clip = self.config.loss.value_clip
        return ops.value_loss(values, micro.returns, None, old_values=micro.values, clip=clip, denominator=tokens)

    def _minibatches(self, size: int, generator: torch.Generator) -> Iterator[tuple[int, int, Array]]:
        """Yield (epoch, number in it, rows of the minibatch), in a new order every epoch; all drawn at the start."""
        epochs = range(self.config.optim.epochs)
        device = generator.device
        orders = [torch.randperm(size, generator=generator, dtype=torch.int64, device=device) for _ in epochs]
        for epoch, order in enumerate(torch.stack(orders).cpu().numpy()):
            for number, start in enumerate(range(0, size, self.config.optim.minibatch_size)):
                yield epoch, number, order[start : start + self.config.optim.minibatch_size]

    @property
    def optimizers(self) -> list[ClippedOptimizer]:
        """The optimizers of the policy and of the value model, if there is one."""
        return [self.policy, *([] if self.value is None else [self.value])]

    def state_dict(self) -> State:
        """Return the states of optimizers, penalty coefficient and loss scale; the models hold the weights."""
        names = ("policy", "value", "penalty", *(["loss_scale"] if self.loss_scale.enabled else []))
        parts = {name: getattr(self, name) for name in names}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: State) -> None:
        for name, part in state.items():
            getattr(self, name).load_state_dict(part)

    def _discard_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _stop_note(self, approx_kl: Tensor, epoch: int) -> str | None:
        """Return why the epochs stop; reads one number from the device, only if target_kl is set."""
        target = self.config.optim.target_kl
        if target is None or not approx_kl > target:
            return None
        reason = f"approx_kl {approx_kl.item():.4f} > target_kl {target}"
        return f"stopped in epoch {epoch + 1} of {self.config.optim.epochs}: {reason}"


def finite_steps(steps: list[Step], *, stop: bool, loss_scale: float | None) -> tuple[list[Step], list[str]]:
    """Return the finite steps, and a message for each step that is not; reads once from the device.

    With a loss scale, a step of which only the gradients are not finite is one that overflows, until the scale is
    below 1. NotFiniteError for the first step that is not finite if `stop`, or if no step is left.
    """
    values = torch.stack([torch.stack([*step.checked().values()]) for step in steps]).tolist()
    good, messages, first = [], [], None
    for step, numbers in zip(steps, values, strict=True):
        found = [(name, x) for name, x in zip(step.checked(), numbers, strict=True) if not math.isfinite(x)]
        overflows = bool(found) and all(name.startswith("grad_norm/") for name, _ in found)
        if not found or (overflows and loss_scale is not None and loss_scale >= 1):
            good.append(dataclasses.replace(step, taken=step.taken and not overflows, overflows=overflows))
            continue
        message = "epoch {}, minibatch {}: {} is not finite: {}".format(step.epoch + 1, step.number + 1, *found[0])
        first = first or NotFiniteError(message, step.rows)
        messages.append(f"skipped {message}")
    if first is not None and (stop or not good):
        raise first
    return good, messages


def combined_over_ranks(metrics: Metrics, world: World) -> Metrics:
    """Return the metrics of a minibatch, whose losses are sums over the whole of it, from those of each rank's share.

    All ranks get the same bits: what they decide by them, they decide alike.
    """
    if world.size == 1 or not metrics:
        return metrics
    found = world.concatenate(torch.stack([*metrics.values()])[None])
    return combine([dict(zip(metrics, row, strict=True)) for row in found], losses=torch.sum)


def zeros_like(metrics: Metrics) -> Metrics:
    """Return metrics of no tokens."""
    return {name: torch.zeros_like(value) for name, value in metrics.items()}


def combine(parts: Sequence[Metrics], losses: Callable[[Tensor], Tensor] = torch.mean) -> Metrics:
    """Join metrics of several batches: means weighted by their `tokens`, maxima by max, losses by `losses`."""
    if not parts[0]:
        return {}
    joined = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    weight = joined["tokens"] / joined["tokens"].sum().clamp_min(1)

    def join(name: str, values: Tensor) -> Tensor:
        if name == "tokens":
            return values.sum()
        if name.endswith("loss"):
            return losses(values)
        return values.max() if name.endswith("max") else (values * weight).sum()

    return {name: join(name, values) for name, values in joined.items()}
