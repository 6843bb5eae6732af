"""Optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ppo_fast.rlhf.config.base import Settings, check_tokens_per_pass
from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.errors import check, divides, not_negative, positive


@dataclass(frozen=True)
class AdamWConfig(Settings):
    """AdamW with one clip of the gradient norm a step; linear warm-up, then the schedule."""

    GROUP = "optim"

    name: Literal["adamw", "adamw_8bit"] = "adamw"  # moments in the weights' dtype; in 8 bits, with stochastic rounding
    master_weights: bool | None = None  # float32 copies of 16-bit weights take the steps; null: those of adapters only
    lr: float = 1e-6  # peak; 1e-6 full fine-tuning, 3e-4 to 2e-3 for tiny models
    betas: tuple[float, float] = (0.9, 0.95)  # decay of AdamW's first and second moments
    eps: float = 1e-5  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled
    max_grad_norm: float = 1.0  # of each trained network, once per optimizer step
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # after the warm-up, down to final_lr_frac or flat
    warmup_frac: float = 0.03  # of all optimizer steps
    warmup_steps: int | None = None  # optimizer steps, in place of warmup_frac; null: by warmup_frac
    final_lr_frac: float = 0.1  # the decay ends at this share of the peak; constant has none

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            not self.master_weights or self.name == "adamw",
            "optim.master_weights",
            "false with optim.name 'adamw_8bit'",
            self.master_weights,
        )
        for name in ("lr", "eps", "max_grad_norm"):
            positive(f"optim.{name}", getattr(self, name))
        for name in ("warmup_frac", "final_lr_frac"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"optim.{name}", f"0 <= {name} <= 1", value)
        if self.warmup_steps is not None:
            not_negative("optim.warmup_steps", self.warmup_steps)
        check(all(0 <= beta < 1 for beta in self.betas), "optim.betas", "two numbers 0 <= beta < 1", self.betas)
        not_negative("optim.weight_decay", self.weight_decay)


@dataclass(frozen=True)
class OptimConfig(AdamWConfig):
    """Two AdamW optimizers, policy and value, over epochs x minibatches x micro-batches."""

    value_lr: float = 5e-6  # peak for the value model
    critic_warmup_updates: int = 0  # first updates in which only the value model learns; shared layout: only its head
    epochs: int = 4  # passes over one rollout batch
    minibatch_size: int = 16  # sequences per optimizer step; divides rollout.batch_size
    micro_batch_size: int | None = None  # sequences per forward pass; divides minibatch_size; null: all
    tokens_per_pass: int | None = None  # tokens per forward pass, prompts and padding included, in place of that
    target_kl: float | None = None  # stop the epochs when a minibatch's approx_kl exceeds this
    in_backward: bool = False  # weights take their steps in the backward pass; clips by the norm of the step before

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("value_lr", "epochs"):
            positive(f"optim.{name}", getattr(self, name))
        not_negative("optim.critic_warmup_updates", self.critic_warmup_updates)
        if self.target_kl is not None:
            positive("optim.target_kl", self.target_kl)
        if self.micro_batch_size is not None:
            divides("optim.micro_batch_size", self.micro_batch_size, "optim.minibatch_size", self.minibatch_size)
        check_tokens_per_pass("optim", self.tokens_per_pass, self.micro_batch_size)
        if self.in_backward:
            whole = self.tokens_per_pass is None and self.micro_batch_size in (None, self.minibatch_size)
            check(whole, "optim.in_backward", "false with several forward passes an optimizer step", True)
            check(self.target_kl is None, "optim.target_kl", "null with optim.in_backward", self.target_kl)


def check_float16(model: WeightsConfig, optim: AdamWConfig) -> None:
    """Refuse float16 weights that take the steps themselves: the squares of their gradients would be 0."""
    trained = model.dtype == "float16" and not model.lora.rank
    check(
        not trained or bool(optim.master_weights),
        "optim.master_weights",
        "true with model.dtype 'float16' unless adapters are trained",
        optim.master_weights,
    )
