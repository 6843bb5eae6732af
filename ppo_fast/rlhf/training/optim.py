"""Optimizer steps of every stage: AdamW with its clip, the learning rate, the penalty coefficient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.rlhf.config.objective import LossConfig
from ppo_fast.rlhf.config.optim import AdamWConfig
from ppo_fast.rlhf.integrity import check_tensors
from ppo_fast.rlhf.split import Rows, Share, local, rows_of, sum_over_ranks
from ppo_fast.rlhf.training.adamw import AdamW, MasterAdamW
from ppo_fast.rlhf.training.adamw_8bit import SMALLEST, AdamW8bit
from ppo_fast.rlhf.training.state import State


class ClippedOptimizer:
    """The trained parameters of a network with their own AdamW and their own gradient-norm clip."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, config: AdamWConfig) -> None:
        self.config, self.lr = config, lr
        weights = [parameter for parameter in parameters if parameter.requires_grad]
        # Each rank steps the rows that it holds, as plain tensors in the memory of the split weights.
        self.parameters = [own_rows(weight) for weight in weights]
        pairs = zip(weights, self.parameters, strict=True)
        self.split = [(weight, parameter) for weight, parameter in pairs if weight is not parameter]
        rows = [rows_of(weight) for weight in weights]
        self.rows = [each for each in rows if each is not None] or None  # None: no weight is split
        self.optimizer = make_optimizer(self.parameters, lr, config, rows)
        self.norm: Tensor | None = None  # 0-d float32, of the gradients, if `clip` was called
        self.loss_scale: Tensor | None = None  # 0-d float32, what the gradients were multiplied by; None: 1

    def begin(self, lr_factor: float, failed: Tensor) -> None:
        """Prepare a step before its backward passes: nothing to do unless they take it."""

    def clip(self, loss_scale: Tensor | None = None) -> Tensor:
        """Return the 0-d float32 norm of the gradients; the step clips it.

        The step's own kernel divides the gradients, also by `loss_scale`, 0-d float32, if the loss was multiplied by
        it: a pass over those of 7 billion weights would move 30 GB.
        """
        for weight, parameter in self.split:
            parameter.grad = None if weight.grad is None else local(weight.grad)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # By dtype: foreach kernels take one at a time. In float32: norms of bfloat16 gradients would be bfloat16.
        kinds = [[g for g in gradients if g.dtype == dtype] for dtype in dict.fromkeys(g.dtype for g in gradients)]
        norms = [norm for same in kinds for norm in torch._foreach_norm(same, 2, dtype=torch.float32)]
        self.norm, self.loss_scale = self._total(norms), loss_scale
        if self.split:
            self.norm = norm_over_ranks(self.norm, self.split[0][0])
        if loss_scale is not None:
            self.norm = self.norm / loss_scale
        return self.norm

    def step(self, lr_factor: float, failed: Tensor | None = None) -> None:
        """Step and clear the gradients; if `failed`, a 0-d bool, weights and moments stay as they are.

        The kernels read the flag on the device, as they do for `torch.amp.GradScaler`: the host does not wait.
        """
        self._prepare(lr_factor, failed, self.norm)
        self.optimizer.take(self.parameters)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.norm = self.loss_scale = None
        for weight, _ in self.split:
            weight.grad = None
        self.optimizer.zero_grad()

    def _total(self, norms: list[Tensor]) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(norms))

    def _prepare(self, lr_factor: float, failed: Tensor | None, norm: Tensor | None) -> None:
        """Begin a step of the optimizer, which divides the gradients as torch's clip_grad_norm_ does for that norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        limit = self.config.max_grad_norm
        scale = None if norm is None else ((norm + 1e-6) / limit).clamp_min(1)
        self.optimizer.grad_scale = scale if scale is None or self.loss_scale is None else scale * self.loss_scale
        self.optimizer.found_inf = None if failed is None else failed.float()
        self.optimizer.begin()

    def state_dict(self) -> State:
        """Return the optimizer's state; of weights that are split, this rank's rows of it."""
        state = self.optimizer.state_dict()
        return state if self.rows is None else shares_of(state)

    def load_state_dict(self, state: State) -> None:
        """Restore; UserError for moments of another shape or dtype: the fused kernel would write out of bounds."""
        if self.rows is not None:
            state = self._own(state, self.rows)
        if isinstance(self.optimizer, torch.optim.AdamW):
            weights = dict(enumerate(self.optimizer.param_groups[0]["params"]))
            for index, moments in state["state"].items():
                own = {
                    "step": torch.zeros((), dtype=torch.float32, device="cpu"),
                    "exp_avg": weights[index],
                    "exp_avg_sq": weights[index],
                }
                check_tensors(own, moments, f"resume: optimizer state {index}")
        self.optimizer.load_state_dict(state)

    def _own(self, state: State, rows: list[Rows]) -> State:
        """Return this rank's rows of the state of whole weights."""

        def part(own: Rows, tensors: State) -> State:
            return {name: own.of(x) if x.ndim else x for name, x in tensors.items()}

        found = dict(state)
        if "state" in state:
            found["state"] = {index: part(rows[index], tensors) for index, tensors in state["state"].items()}
        if "moments" in state:
            found["moments"] = [part(own, tensors) for own, tensors in zip(rows, state["moments"], strict=True)]
        if "masters" in state:
            known = {id(parameter): own for parameter, own in zip(self.parameters, rows, strict=True)}
            masters = self.optimizer.weights  # type: ignore[union-attr]  # of MasterAdamW
            pairs = zip(masters, state["masters"], strict=True)
            found["masters"] = [known[id(weight)].of(master) for weight, master in pairs]
        return found


class InBackwardOptimizer(ClippedOptimizer):
    """Takes a large weight's step in the backward pass, once its gradient is complete, and frees the gradient.

    So the gradients of all weights never exist. A step is one backward pass, between `begin` and `step`, which takes
    the steps of the small weights. Gradients are clipped by the norm of the step before, those of the first step not.
    A gradient that is not finite changes no weight, nor do those after it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, config: AdamWConfig) -> None:
        super().__init__(parameters, lr, config)
        self.last_norm = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)  # of the step before
        self._norms: list[Tensor] | None = None  # of the gradients that are gone; None: no step has begun
        for parameter in self.parameters:
            if parameter.numel() >= SMALLEST:
                parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self, lr_factor: float, failed: Tensor) -> None:
        self._norms = []
        self._prepare(lr_factor, failed, self.last_norm)

    def step(self, lr_factor: float, failed: Tensor | None = None) -> None:
        if self._norms is None:
            return super().step(lr_factor, failed)
        self.optimizer.found_inf = None if failed is None else failed.float()
        self.optimizer.take(self.parameters)
        assert self.norm is not None  # of `clip`, which comes before
        self.last_norm = self.norm
        return self.zero_grad()

    def zero_grad(self) -> None:
        self._norms = None
        super().zero_grad()

    def _total(self, norms: list[Tensor]) -> Tensor:
        return super()._total(norms + (self._norms or []))

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        if self._norms is None or parameter.grad is None:
            return
        self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        not_finite = (~self._norms[-1].isfinite()).float()
        self.optimizer.found_inf = torch.maximum(self.optimizer.found_inf, not_finite)  # type: ignore[arg-type]
        self.optimizer.take([parameter])
        parameter.grad = None

    def state_dict(self) -> State:
        return super().state_dict() | {"last_norm": self.last_norm}

    def load_state_dict(self, state: State) -> None:
        rest = dict(state)
        self.last_norm.copy_(rest.pop("last_norm"))
        super().load_state_dict(rest)


def shares_of(state: Any) -> Any:
    """Return a state whose tensors, except 0-d ones, are the `Share` of this rank."""
    if isinstance(state, dict):
        return {name: shares_of(value) for name, value in state.items()}
    if isinstance(state, list):
        return [shares_of(value) for value in state]
    return Share(state) if isinstance(state, Tensor) and state.ndim else state


def own_rows(weight: nn.Parameter) -> nn.Parameter:
    """Return the rows of a weight that are on this rank, in the same memory; the weight itself if it is not split."""
    rows = local(weight)
    return weight if rows is weight else nn.Parameter(rows)


def norm_over_ranks(norm: Tensor, weight: Tensor) -> Tensor:
    """Return the norm of all gradients from that of this rank's rows; `weight` is one that is split."""
    squares = norm**2
    total = sum_over_ranks(squares, [weight])
    return norm if total is squares else total.sqrt()


def make_optimizer(
    parameters: list[nn.Parameter], lr: float, config: AdamWConfig, rows: Sequence[Rows | None] | None = None
) -> AdamW | AdamW8bit:
    """Return AdamW with the states that `config` asks for; `rows` are those of split weights that it steps."""
    options: dict[str, Any] = {
        "lr": lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw_8bit":
        return AdamW8bit(parameters, rows=rows, **options)
    if config.master_weights:
        return MasterAdamW(parameters, **options)
    return AdamW(parameters, **options)


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

    def state_dict(self) -> State:
        return {"coef": self.coef}

    def load_state_dict(self, state: State) -> None:
        coef = state["coef"]
        self.coef = coef.to(self.coef.device) if isinstance(self.coef, Tensor) else coef


def schedule(step: int, total: int, config: AdamWConfig) -> float:
    """Return the learning-rate factor of `step` (from 0) of `total`: linear warm-up, then by `optim.schedule`.

    Of the d in [0, 1) of the steps after the warm-up: linear 1 - (1 - f) d, cosine f + (1 - f) (1 + cos(pi d)) / 2,
    with f = `final_lr_frac`; constant 1.
    """
    warmup = math.ceil(config.warmup_frac * total) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    share, final = (step - warmup) / max(1, total - warmup), config.final_lr_frac
    if config.schedule == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2
    return 1 - (1 - final) * share
