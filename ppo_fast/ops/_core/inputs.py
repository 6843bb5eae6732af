"""Inputs of the registered ops, one NamedTuple each: the schema of an op and its launchers follow from it.

Tensors are checked, detached (except logits and values) and on one device. There are B sequences of T tokens; packed
sequences are one row of N, whose per-token tensors a launcher of kernels takes as [N] too.
"""

from typing import NamedTuple

from torch import Tensor


class RowInputs(NamedTuple):
    """Rows of logits, for ``token_stats``, its backward and ``policy_loss``."""

    logits: Tensor  # [B, T, V], unit stride over V
    targets: Tensor | None  # [B, T], int32 or int64, any strides; None: no log-probabilities
    ref_logits: Tensor | None  # [B, T, V], unit stride over V; None: no KL
    mask: Tensor | None  # [B, T], bool, contiguous; None: every row counts
    temperature: float


class RowGrads(NamedTuple):
    """The gradients of a loss in the statistics of each row, [B, T]; None leaves one out."""

    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    grad_kl: Tensor | None

    @property
    def nothing(self) -> bool:
        """Whether all are left out."""
        return self.grad_logprobs is None and self.grad_entropy is None and self.grad_kl is None

    def scaled(self, factor: Tensor | None) -> "RowGrads":
        """Each times ``factor``; None: 1."""
        return self if factor is None else RowGrads(*[None if x is None else x * factor for x in self])

    def divided(self, scale: Tensor) -> "RowGrads":
        """Each over ``scale``."""
        return RowGrads(*[None if x is None else x / scale for x in self])


def given_grads(*grads: Tensor | None) -> RowGrads:
    """The gradients, contiguous; those that are empty or None are left out."""
    return RowGrads(*[None if x is None or not x.numel() else x.contiguous() for x in grads])


class SampleInputs(NamedTuple):
    """Inputs of ``sample_tokens``, without gradient."""

    logits: Tensor  # [B, T, V], unit stride over V
    keys: Tensor  # [B, T, 3], int64, contiguous: seed, row of the global batch, step
    temperature: float
    top_k: int | None  # below V; None: no filter
    top_p: float | None  # below 1; None: no filter


class ValueInputs(NamedTuple):
    """Inputs of ``value_loss``. Floats except the values are contiguous and have the accumulation dtype."""

    values: Tensor  # [B, T], any strides, in the dtype of the caller
    returns: Tensor  # [B, T]
    mask: Tensor | None  # [B, T], bool, contiguous; None: every token counts
    old_values: Tensor | None  # [B, T]; None: no clip
    cu_seqlens: Tensor | None  # [S + 1], int32 or int64, contiguous; None: a row is a sequence
    denominator: Tensor | float | None  # [] or a number; None: the count of the aggregation
    clip: float | None
    aggregation: str


class GaeInputs(NamedTuple):
    """Inputs of ``gae`` and ``gae_packed``. Sequences are rows [B, T], or packed [N] with ``cu_seqlens``."""

    rewards: Tensor  # [B, T] or [N], any strides
    values: Tensor  # the shape of rewards, any strides, perhaps of another dtype
    cu_seqlens: Tensor | None  # [S + 1], int32 or int64, contiguous; None: padded
    mask: Tensor | None  # bool, the shape of rewards; None: every step counts
    bootstrap: Tensor | None  # [B] or [S]; None: 0
    dones: Tensor | None  # bool, the shape of rewards; None: no episode ends within
    gamma: float
    lam: float
    mask_mode: str  # "carry" | "zero"
