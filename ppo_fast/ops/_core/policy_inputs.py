"""Check and flatten the inputs of the policy losses, and name their results."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops._core import checks
from ppo_fast.ops._core.config import COEFFICIENTS, PolicyInputs, PolicyLossConfig
from ppo_fast.ops._core.layout import as_floats, as_scalar, as_shape, as_tensor
from ppo_fast.ops._core.results import METRICS, LossOutput, TokenStats


class PerToken(NamedTuple):
    """The per-token arguments of the public ops, the first fields of PolicyInputs."""

    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None


PER_TOKEN = PerToken._fields
_PER_SEQUENCE = ("advantages", "importance_weights")  # of these [B, 1] is taken too


def _check_reference(
    op: str, config: PolicyLossConfig, ref_logprobs: Tensor | None, other: Tensor | None, other_name: str
) -> None:
    """Raise unless there is at most one reference, of the kind the estimator reads, and one where kl_coef is not 0."""
    if ref_logprobs is not None and other is not None:
        raise ValueError(f"{op}: expected ref_logprobs or {other_name}, got both")
    full = config.kl_estimator == "full"
    wanted, wrong = (other_name, ref_logprobs) if full else ("ref_logprobs", other)
    if wrong is not None:
        got = "ref_logprobs" if full else other_name
        raise ValueError(f"{op}: expected {wanted} with kl_estimator={config.kl_estimator!r}, got {got}")
    weighted = isinstance(config.kl_coef, Tensor) or config.kl_coef != 0
    if weighted and ref_logprobs is None and other is None:
        raise ValueError(f"{op}: expected {wanted} with kl_coef={config.kl_coef}, got no reference")


def check_config(op: str, config: object) -> None:
    """Raise unless ``config`` is a PolicyLossConfig."""
    if not isinstance(config, PolicyLossConfig):
        raise ValueError(f"{op}: expected config to be a PolicyLossConfig, got {type(config).__name__}")


def check_policy_inputs(
    op: str,
    config: PolicyLossConfig,
    targets: Tensor,
    per_token: PerToken,
    other_reference: Tensor | None,
    other_name: str,
    cu_seqlens: Tensor | None,
    denominator: float | Tensor | None,
) -> None:
    """Check everything that does not depend on the logits, against checked ``targets``.

    Args:
        other_reference: the reference that kl_estimator "full" reads, of the argument ``other_name``.
    """
    _check_reference(op, config, per_token.ref_logprobs, other_reference, other_name)
    checks.tensor(op, "advantages", per_token.advantages)
    shape = targets.shape
    for name, value in zip(PER_TOKEN, per_token, strict=True):
        if value is not None:
            checks.per_token(op, name, value, "targets", targets, shape, broadcast=name in _PER_SEQUENCE)
    checks.cu_seqlens(op, cu_seqlens, "targets", targets, shape)
    checks.denominator(op, denominator)
    if config.needs_sequences and cu_seqlens is None and targets.dim() < 2:
        option = f"ratio={config.ratio!r}, aggregation={config.aggregation!r}"
        raise ValueError(f"{op}: expected cu_seqlens for packed [N] targets with {option}, got None")


def policy_inputs(
    config: PolicyLossConfig,
    like: Tensor,
    shape: torch.Size,
    per_token: PerToken,
    cu_seqlens: Tensor | None,
    denominator: float | Tensor | None,
    by_address: bool = False,
) -> PolicyInputs:
    """Flatten checked arguments for the launchers. ``like`` gives device and dtype, ``shape`` is the targets'."""
    dtype = checks.accumulation_dtype(like.dtype)
    old, advantages, ref, importance = (as_floats(x, shape, dtype, by_address) for x in per_token)
    assert advantages is not None
    return PolicyInputs(
        old_logprobs=old,
        advantages=advantages,
        ref_logprobs=ref,
        importance_weights=importance,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        denominator=None if denominator is None else as_scalar(denominator, like),
        penalty_coef=_coefficient(config.penalty_coef, like),
        ent_coef=_coefficient(config.ent_coef, like),
        kl_coef=_coefficient(config.kl_coef, like),
        clip_low=math.inf if config.clip_low is None else float(config.clip_low),
        clip_high=math.inf if config.clip_high is None else float(config.clip_high),
        dual_clip=math.inf if config.dual_clip is None else float(config.dual_clip),
        ratio=config.ratio,
        kl_estimator=config.kl_estimator,
        aggregation=config.aggregation,
        objective=config.objective,
    )


def _coefficient(value: float | Tensor, like: Tensor) -> float | Tensor | None:
    return as_scalar(value, like) if isinstance(value, Tensor) or value != 0 else None


def with_tensors(policy: PolicyInputs, like: Tensor) -> PolicyInputs:
    """Return the inputs as the registered ops take them: numbers that a schedule may change are 0-d tensors."""
    numbers: dict[str, Any] = {name: as_tensor(getattr(policy, name), like) for name in ("denominator", *COEFFICIENTS)}
    return policy._replace(**numbers)


def check_values(op: str, policy: PolicyInputs, mask: Tensor | None) -> None:
    """Check what depends on values, in the launcher of an op. CPU tensors only."""
    rows = policy.advantages.numel()
    if policy.cu_seqlens is not None:
        checks.cu_seqlens_values(op, policy.cu_seqlens, rows)
    if policy.denominator is not None:
        checks.denominator_value(op, policy.denominator, mask, rows)
    for name, value in zip(COEFFICIENTS, (policy.penalty_coef, policy.ent_coef, policy.kl_coef), strict=True):
        if isinstance(value, Tensor):
            checks.coefficient_value(op, name, value)


def named_output(
    loss: Tensor, metrics: Tensor, logprobs: Tensor, entropy: Tensor, kl: Tensor | None, shape: torch.Size
) -> LossOutput:
    """Results of a registered op as the public ops return them."""
    if kl is not None:
        kl = as_shape(kl, shape) if kl.numel() else None
    stats = TokenStats(as_shape(logprobs, shape), as_shape(entropy, shape), kl)
    return LossOutput(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), stats)
