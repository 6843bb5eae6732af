"""What the policy losses take besides logits or hidden states: checked, flattened, and the results named again."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops._core import checks
from ppo_fast.ops._core.config import PolicyLossConfig, coefficient
from ppo_fast.ops._core.layout import as_denominator, as_floats
from ppo_fast.ops._core.results import METRICS, LossOutput, TokenStats

COEFFICIENTS = ("penalty_coef", "ent_coef", "kl_coef")


class Terms(NamedTuple):
    """The arguments of ``reference.policy_terms`` from old_logprobs on: the tail of the registered ops' arguments.

    Per-token tensors are contiguous [B, T], numbers that a schedule may change 0-d tensors, all in the accumulation
    dtype. An open clip and no dual clip are infinite; a coefficient of None leaves its term out.
    """

    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    cu_seqlens: Tensor | None
    denominator: Tensor | None
    penalty_coef: Tensor | None
    ent_coef: Tensor | None
    kl_coef: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float
    ratio: str
    kl_estimator: str
    aggregation: str


def _check_reference(
    op: str, config: PolicyLossConfig, ref_logprobs: Tensor | None, other: Tensor | None, other_name: str
) -> None:
    """One reference at most, of the kind the estimator reads; some reference where kl_coef is not 0."""
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


def check_terms(
    op: str,
    config: PolicyLossConfig,
    targets: Tensor,
    per_token: dict[str, Tensor | None],
    other_reference: Tensor | None,
    other_name: str,
    cu_seqlens: Tensor | None,
    denominator: float | Tensor | None,
) -> None:
    """Everything that does not depend on the logits, against checked ``targets``.

    Args:
        per_token: old_logprobs, advantages, ref_logprobs, importance_weights by name.
        other_reference: the reference that kl_estimator "full" reads, of the argument ``other_name``.
    """
    _check_reference(op, config, per_token["ref_logprobs"], other_reference, other_name)
    checks.tensor(op, "advantages", per_token["advantages"])
    for name, value in per_token.items():
        per_sequence = name in ("advantages", "importance_weights")
        checks.per_token(op, name, value, "targets", targets, targets.shape, broadcast=per_sequence)
    checks.cu_seqlens(op, cu_seqlens, "targets", targets, targets.shape)
    checks.denominator(op, denominator)
    if config.needs_sequences and cu_seqlens is None and targets.dim() < 2:
        option = f"ratio={config.ratio!r}, aggregation={config.aggregation!r}"
        raise ValueError(f"{op}: expected cu_seqlens beside packed [N] targets with {option}, got None")


def flat_terms(
    config: PolicyLossConfig,
    like: Tensor,
    shape: torch.Size,
    per_token: dict[str, Tensor | None],
    cu_seqlens: Tensor | None,
    denominator: float | Tensor | None,
) -> Terms:
    """Checked arguments as the registered ops take them; ``like`` gives device and dtype, ``shape`` is the targets'."""
    dtype = checks.accumulation_dtype(like.dtype)
    coefficients: dict[str, Any] = {name: coefficient(getattr(config, name), like) for name in COEFFICIENTS}
    rows: dict[str, Any] = {name: as_floats(value, shape, dtype) for name, value in per_token.items()}
    return Terms(
        **rows,
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        denominator=as_denominator(denominator, like),
        **coefficients,
        clip_low=math.inf if config.clip_low is None else float(config.clip_low),
        clip_high=math.inf if config.clip_high is None else float(config.clip_high),
        dual_clip=math.inf if config.dual_clip is None else float(config.dual_clip),
        ratio=config.ratio,
        kl_estimator=config.kl_estimator,
        aggregation=config.aggregation,
    )


def named_output(results: tuple[Tensor, ...], shape: torch.Size) -> LossOutput:
    """(loss, metrics, logprobs, entropy, kl, ...) of a registered op as the public ops return them."""
    loss, metrics, logprobs, entropy, kl, *_ = results
    stats = TokenStats(logprobs.view(shape), entropy.view(shape), kl.view(shape) if kl.numel() else None)
    return LossOutput(loss, dict(zip(METRICS, metrics.unbind(), strict=True)), stats)
