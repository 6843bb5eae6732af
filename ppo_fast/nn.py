"""The losses as modules, for a config or next to a model. Each calls the op of its name."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ppo_fast.ops import PolicyLossConfig, linear_policy_loss, policy_loss, value_loss
from ppo_fast.ops._core.results import LossOutput


class PolicyLoss(nn.Module):
    """:func:`ppo_fast.policy_loss` with the config and the constant options fixed.

    Args:
        config: a PolicyLossConfig or its fields as a mapping.
        inplace: let the gradient take the storage of the logits.
        backend: "auto" | "torch" | "triton" | "native".

    Example:
        >>> import torch
        >>> loss = PolicyLoss({"clip_high": 0.28})
        >>> loss(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]), None, torch.ones(1, 2), None).loss.item()
        -1.0
    """

    def __init__(
        self,
        config: PolicyLossConfig | Mapping[str, Any] | None = None,
        *,
        inplace: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config, self.inplace, self.backend = _config(config), inplace, backend

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None,
        **tensors: Any,
    ) -> LossOutput:
        """The op's arguments; ``tensors`` are its ref_logprobs, ref_logits, importance_weights, cu_seqlens,
        denominator, group."""
        options: dict[str, Any] = {"config": self.config, "inplace": self.inplace, "backend": self.backend}
        return policy_loss(logits, targets, old_logprobs, advantages, mask, **options, **tensors)

    def extra_repr(self) -> str:
        return f"{self.config}, inplace={self.inplace}, backend={self.backend!r}"


class LinearPolicyLoss(nn.Module):
    """:func:`ppo_fast.linear_policy_loss` with the config and the constant options fixed.

    Args:
        config: a PolicyLossConfig or its fields as a mapping.
        softcap: logits become softcap*tanh(logits/softcap); None: as they are.
        chunk_size: rows whose logits exist at once; None: chosen by the op.
        half_logits: keep half-precision logits rounded on a GPU.
        backend: "auto" | "torch" | "triton" | "native".
    """

    def __init__(
        self,
        config: PolicyLossConfig | Mapping[str, Any] | None = None,
        *,
        softcap: float | None = None,
        chunk_size: int | None = None,
        half_logits: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config, self.softcap, self.chunk_size, self.backend = _config(config), softcap, chunk_size, backend
        self.half_logits = half_logits

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        mask: Tensor | None,
        **tensors: Any,
    ) -> LossOutput:
        """The op's arguments; ``tensors`` are its bias, ref_logprobs, ref_hidden, ref_weight, ref_bias,
        importance_weights, cu_seqlens, denominator, group."""
        names = ("softcap", "chunk_size", "half_logits", "backend")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return linear_policy_loss(
            hidden, weight, targets, old_logprobs, advantages, mask, config=self.config, **options, **tensors
        )

    def extra_repr(self) -> str:
        return f"{self.config}, softcap={self.softcap}, chunk_size={self.chunk_size}, backend={self.backend!r}"


class ValueLoss(nn.Module):
    """:func:`ppo_fast.value_loss` with the constant options fixed.

    Args:
        clip: c > 0 keeps new values within c of the old ones; None: the plain squared error.
        aggregation: "token-mean" | "seq-mean-token-mean" | "seq-mean-token-sum".
        backend: "auto" | "torch" | "triton" | "native".
    """

    def __init__(self, clip: float | None = None, *, aggregation: str = "token-mean", backend: str = "auto") -> None:
        super().__init__()
        self.clip, self.aggregation, self.backend = clip, aggregation, backend

    def forward(self, values: Tensor, returns: Tensor, mask: Tensor | None, **tensors: Any) -> LossOutput:
        """The op's arguments; ``tensors`` are its old_values, cu_seqlens, denominator."""
        options: dict[str, Any] = {"clip": self.clip, "aggregation": self.aggregation, "backend": self.backend}
        return value_loss(values, returns, mask, **options, **tensors)

    def extra_repr(self) -> str:
        return f"clip={self.clip}, aggregation={self.aggregation!r}, backend={self.backend!r}"


def _config(config: PolicyLossConfig | Mapping[str, Any] | None) -> PolicyLossConfig:
    """The options given, or the defaults."""
    return config if isinstance(config, PolicyLossConfig) else PolicyLossConfig(**(config or {}))
