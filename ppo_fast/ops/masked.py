"""Small masked functions of per-token tensors, in plain torch: means, whitening, KL estimates. All differentiable."""

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._core import checks
from ppo_fast.ops._core.config import KL_ESTIMATORS


def _counted(op: str, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` in the accumulation dtype with 0 where masked, and how many elements count."""
    checks.floating(op, "x", x)
    checks.boolean(op, "mask", mask, "x", x, x.shape)
    x = x.to(checks.accumulation_dtype(x.dtype))
    if mask is None:
        return x, torch.full((), x.numel(), dtype=x.dtype, device=x.device)
    return torch.where(mask, x, 0.0), mask.sum().to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of ``x`` over the counted elements: ``x[mask].mean()``, and 0 where none counts.

    Args:
        x: any shape, floating.
        mask: bool, the shape of ``x``; None counts every element. Masked elements may be NaN.

    Returns:
        0-d, float32 (float64 for float64 ``x``), differentiable.

    Raises:
        ValueError: dtype, shape or device that does not fit.

    Example:
        >>> import torch
        >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False])).item()
        2.0
    """
    x, count = _counted("masked_mean", x, mask)
    return x.sum() / count.clamp(min=1)


def whiten(x: Tensor, mask: Tensor | None, *, shift_mean: bool = True) -> Tensor:
    """``(x - mean) * rsqrt(var + 1e-8)`` over the counted elements, with the unbiased variance; 0 where masked.

    Args:
        x: any shape, floating.
        mask: bool, the shape of ``x``; None counts every element.
        shift_mean: False adds the mean back, so that only the scale changes.

    Returns:
        The shape of ``x``, float32 (float64 for float64 ``x``), differentiable. One counted element gives 0
        (its own value with ``shift_mean=False``).

    Raises:
        ValueError: dtype, shape or device that does not fit.

    Example:
        >>> import torch
        >>> whiten(torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([True, True, True, False])).tolist()
        [-1.0, 0.0, 1.0, 0.0]
    """
    x, count = _counted("whiten", x, mask)
    mean = x.sum() / count.clamp(min=1)
    centered = x - mean if mask is None else torch.where(mask, x - mean, 0.0)
    var = centered.square().sum() / (count - 1).clamp(min=1)
    white = centered * torch.rsqrt(var + 1e-8)
    if shift_mean:
        return white
    return white + mean if mask is None else torch.where(mask, white + mean, 0.0)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Per-token estimate of KL(pi || ref) from log-probabilities of sampled tokens.

    With d = clamp(ref - logprob, -20, 20): ``k1 = logprob - ref``, ``k2 = (logprob - ref)^2 / 2``,
    ``k3 = exp(d) - 1 - d``. k1 and k3 are unbiased, k3 is never negative, and k2 has the KL's own gradient on policy.

    Args:
        logprobs: any shape, floating.
        ref_logprobs: the shape of ``logprobs``.
        estimator: "k1" | "k2" | "k3".

    Returns:
        The shape of ``logprobs``, nats, float32 (float64 for float64 input), differentiable in both.

    Raises:
        ValueError: dtype, shape, device or estimator that does not fit.

    Example:
        >>> import torch
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-3.0]), "k2").item()
        2.0

    Source: Schulman 2020, "Approximating KL Divergence".
    """
    op = "kl_estimate"
    checks.floating(op, "logprobs", logprobs)
    checks.tensor(op, "ref_logprobs", ref_logprobs)
    checks.per_token(op, "ref_logprobs", ref_logprobs, "logprobs", logprobs, logprobs.shape)
    checks.one_of(op, "estimator", estimator, KL_ESTIMATORS[:3])
    dtype = checks.accumulation_dtype(torch.promote_types(logprobs.dtype, ref_logprobs.dtype))
    return reference.kl_values(logprobs.to(dtype) - ref_logprobs.to(dtype), estimator)[0]
