"""Batches for the policy loss that reach every branch, the grid of its options, and the three-way comparison."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import ppo_fast as pf
from tests import eager, oracles
from tests.helpers import assert_near_truth

B, T, V = 4, 4, 5
# Short, holed, uncounted and full sequences; packed, two more are empty.
LENGTHS = {"padded": [4, 4, 4, 4], "packed": [5, 0, 3, 1, 0, 7]}
COUNTED = [1, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]

OPTIONS: dict[str, tuple[Any, ...]] = {
    "objective": ("clip", "cispo"),
    "clip_low": (0.2, None),
    "clip_high": (0.2, None, 0.4),
    "dual_clip": (None, 1.5),
    "ratio": ("token", "sequence"),
    "penalty_coef": (0.0, 0.3),
    "ent_coef": (0.0, 0.1),
    "kl_coef": (0.0, 0.2),
    "kl_estimator": ("k1", "k2", "k3", "full"),
    "temperature": (1.0, 0.7),
    "aggregation": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"),
}


def option_grid(fraction: int = 1) -> Iterator[dict[str, Any]]:
    """Every allowed combination; or one in ``fraction``: the indices weighted by powers of 3 sum to a multiple."""
    for indices in itertools.product(*(range(len(values)) for values in OPTIONS.values())):
        options = {name: OPTIONS[name][i] for name, i in zip(OPTIONS, indices, strict=True)}
        if allowed(options) and sum(index * 3**place for place, index in enumerate(indices)) % fraction == 0:
            yield options


def allowed(options: dict[str, Any]) -> bool:
    """Whether the config takes these options together."""
    return options.get("objective") != "cispo" or options.get("dual_clip") is None


class Case(NamedTuple):
    """Inputs of one call; float tensors are float32 whatever the dtype of the logits."""

    logits: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor
    ref_logits: Tensor
    cu_seqlens: Tensor | None


def make_case(layout: str, dtype: torch.dtype = torch.float32, seed: int = 3) -> Case:
    """16 tokens, padded [4, 4] or packed in 6 sequences; log ratios of about +-1, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    N = B * T
    logits = (1.5 * normal(N, V)).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    logprobs = eager.token_stats(logits.float(), targets)[0]
    # The first half falls and the second rises, so that sequence ratios leave the clip on both sides too.
    drift = torch.tensor([-0.6, 0.9]).repeat_interleave(N // 2)
    signs = torch.tensor([1.0, -1.0]).repeat(N // 2)
    case = Case(
        logits,
        targets,
        logprobs - 0.6 * normal(N) - drift,
        signs * (0.2 + normal(N).abs()),
        torch.tensor(COUNTED, dtype=torch.bool),
        logprobs + 0.5 * normal(N),
        (logits.float() + normal(N, V)).to(dtype),
        None,
    )
    if layout == "packed":
        offsets = [0, *itertools.accumulate(LENGTHS["packed"])]
        return case._replace(cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
    shaped = [x.unflatten(0, (B, T)) for x in case[:-1]]
    return Case(*shaped, None)


def segments(case: Case) -> oracles.Segments:
    """The rows of each sequence."""
    if case.cu_seqlens is None:
        return oracles.padded_segments(B, T)
    return oracles.packed_segments(case.cu_seqlens.tolist())


def references(case: Case, config: pf.PolicyLossConfig) -> dict[str, Tensor]:
    """The reference that the estimator reads."""
    name = "ref_logits" if config.kl_estimator == "full" else "ref_logprobs"
    return {name: getattr(case, name)}


def _flat_float64(name: str, x: Tensor) -> np.ndarray:
    x = x.double() if x.is_floating_point() else x
    return (x.reshape(-1, V) if name.endswith("logits") else x.flatten()).numpy()


def truth(case: Case, config: pf.PolicyLossConfig, **more: Any) -> oracles.PolicyTruth:
    """The oracle's answer; ``more`` are further inputs and replacements of the case's."""
    inputs = {**case._asdict(), **references(case, config), **more}
    if config.kl_estimator == "full":
        inputs["ref_logprobs"] = None
    else:
        inputs["ref_logits"] = None
    del inputs["cu_seqlens"]
    rows = {name: _flat_float64(name, x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    return oracles.policy_loss(counted=rows.pop("mask"), segments=segments(case), config=config, **rows)


def hide_uncounted(case: Case) -> Case:
    """The case with NaN in every uncounted position, and targets of -100 there."""
    hidden = {}
    for name, x in case._asdict().items():
        if name not in ("mask", "cu_seqlens"):
            where = case.mask if x.dim() == case.mask.dim() else case.mask[..., None]
            x = torch.where(where, x, torch.nan if x.is_floating_point() else -100)
        hidden[name] = x
    return Case(**hidden)


def run(case: Case, config: pf.PolicyLossConfig, backend: str, **more: Any) -> tuple[pf.LossOutput, Tensor]:
    """(output, gradient of the logits) of the op on a case."""
    inputs = {**case._asdict(), **more}
    inputs = {k: v for k, v in inputs.items() if k not in ("ref_logits", "ref_logprobs")}
    logits = inputs.pop("logits").detach().requires_grad_()
    out = pf.policy_loss(logits, **inputs, **references(case, config), config=config, backend=backend)
    (grad,) = torch.autograd.grad(out.loss, logits)
    return out, grad


def run_eager(case: Case, config: pf.PolicyLossConfig, **more: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of the hand-written loss."""
    inputs = {**case._asdict(), **more}
    inputs = {k: v for k, v in inputs.items() if k not in ("ref_logits", "ref_logprobs")}
    logits = inputs.pop("logits").detach().requires_grad_()
    loss = eager.policy_loss(logits, **inputs, **references(case, config), config=config)
    (grad,) = torch.autograd.grad(loss, logits)
    return loss, grad


def check(case: Case, config: pf.PolicyLossConfig, backend: str, **more: Any) -> oracles.PolicyTruth:
    """Loss, gradient, metrics and per-token results obey the tolerance rule, with NaN in uncounted positions."""
    dtype = case.logits.dtype
    expected = truth(case, config, **more)
    loss, eager_grad = run_eager(case, config, **more)
    out, grad = run(hide_uncounted(case), config, backend, **more)
    assert grad.dtype == dtype
    assert_near_truth(out.loss, expected.loss, loss, dtype=dtype)
    assert_near_truth(grad, expected.grad, eager_grad, dtype=dtype, gradient=True)
    assert out.metrics.keys() == expected.metrics.keys()
    for name, value in out.metrics.items():
        assert_near_truth(value, expected.metrics[name], dtype=dtype)
    for ours, theirs in zip(out.per_token, (expected.logprobs, expected.entropy, expected.kl), strict=True):
        assert_near_truth(ours, theirs, dtype=dtype)
    return expected
