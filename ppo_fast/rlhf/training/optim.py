"""Optimizer steps of every stage: AdamW with its clip, the learning rate, the penalty coefficient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ppo_fast.rlhf.config.ppo import AdamWConfig, LossConfig
from ppo_fast.rlhf.integrity import check_tensors
from ppo_fast.rlhf.training.adamw import AdamW8bit, MasterAdamW
from ppo_fast.rlhf.training.state import State


class ClippedOptimizer:
    """The trained parameters of a network with their own AdamW and their own gradient-norm clip."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, config: AdamWConfig) -> None:
        self.config, self.lr = config, lr
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.optimizer = make_optimizer(self.parameters, lr, config)

    def clip(self) -> Tensor:
        """Clip the gradients and return their 0-d float32 norm before clipping."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        # By dtype: foreach kernels take one at a time. In float32: norms of bfloat16 gradients would be bfloat16.
        kinds = [[g for g in gradients if g.dtype == dtype] for dtype in dict.fromkeys(g.dtype for g in gradients)]
        norms = [norm for same in kinds for norm in torch._foreach_norm(same, 2, dtype=torch.float32)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        nn.utils.clip_grads_with_norm_(self.parameters, self.config.max_grad_norm, norm)
        return norm

    def step(self, lr_factor: float, failed: Tensor | None = None) -> None:
        """Step and clear the gradients; if `failed`, a 0-d bool, weights and moments stay as they are.

        The kernels read the flag on the device, as they do for `torch.amp.GradScaler`: the host does not wait.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimizer.found_inf = None if failed is None else failed.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad()

    def state_dict(self) -> State:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Restore; UserError for moments of another shape or dtype: the fused kernel would write out of bounds."""
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


def make_optimizer(parameters: list[nn.Parameter], lr: float, config: AdamWConfig) -> torch.optim.Optimizer:
    """Return AdamW with the states that `config` asks for."""
    options: dict[str, Any] = {
        "lr": lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw_8bit":
        return AdamW8bit(parameters, **options)
    if config.master_weights:
        return MasterAdamW(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


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
