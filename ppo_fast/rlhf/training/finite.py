"""Checks that tensors and metrics are finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ppo_fast.rlhf.errors import NotFiniteError, UserError


def require_finite(**tensors: Tensor) -> None:
    """Raise NotFiniteError with the name of the first tensor that holds a NaN or an infinity."""
    finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
    for name, ok in zip(tensors, finite, strict=True):
        if not ok:
            values = tensors[name].flatten()
            raise NotFiniteError(f"{name} is not finite: {values[~values.isfinite()][0].item()}")


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise a UserError that names the first metric that is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is not finite: {value}")
