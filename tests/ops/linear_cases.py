"""The batches of :mod:`tests.ops.policy_cases` as hidden states under a head, and the three-way comparison."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import ppo_fast as pf
from tests import eager, oracles
from tests.helpers import assert_near_truth
from tests.ops import policy_cases
from tests.ops.policy_cases import Case, V

D = 6
REF_D = 7
LEAVES = ("hidden", "weight", "bias")


class LinearCase(NamedTuple):
    """Hidden states and heads whose logits are those of ``rows`` to rounding; ``rows`` has the other inputs."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor
    rows: Case

    def head(self, prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, weight, bias) of the policy, or of the reference with "ref_"."""
        return getattr(self, f"{prefix}hidden"), getattr(self, f"{prefix}weight"), getattr(self, f"{prefix}bias")


def _head_of(logits: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden, weight, bias) with hidden @ weight.T + bias = logits."""
    weight = torch.randn(V, size, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    return (logits.double() - bias) @ torch.linalg.pinv(weight.T), weight, bias


def make_linear_case(layout: str, dtype: torch.dtype = torch.float32) -> LinearCase:
    """The case of ``make_case(layout)`` with heads in ``dtype``."""
    rows, generator = policy_cases.make_case(layout), torch.Generator().manual_seed(11)
    heads = (*_head_of(rows.logits, D, generator), *_head_of(rows.ref_logits, REF_D, generator))
    return LinearCase(*(x.to(dtype) for x in heads), rows)


def logits_of(head: tuple[Tensor, Tensor, Tensor], softcap: float | None) -> Tensor:
    """The materialized logits."""
    x = torch.nn.functional.linear(*head)
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def hide_uncounted(case: LinearCase) -> LinearCase:
    """NaN in every uncounted position, and targets of -100 there."""
    counted = case.rows.mask[..., None]
    hidden, ref_hidden = (torch.where(counted, x, torch.nan) for x in (case.hidden, case.ref_hidden))
    return case._replace(hidden=hidden, ref_hidden=ref_hidden, rows=policy_cases.hide_uncounted(case.rows))


def row_inputs(case: LinearCase, **more: Any) -> dict[str, Any]:
    """The per-token inputs by name, without the references."""
    inputs = {**case.rows._asdict(), **more}
    return {k: v for k, v in inputs.items() if k not in ("logits", "ref_logits", "ref_logprobs")}


def references(case: LinearCase, config: pf.PolicyLossConfig) -> dict[str, Tensor]:
    """The reference that the estimator reads."""
    if config.kl_estimator == "full":
        return dict(zip(("ref_hidden", "ref_weight", "ref_bias"), case.head("ref_"), strict=True))
    return {"ref_logprobs": case.rows.ref_logprobs}


def run(case: LinearCase, config: pf.PolicyLossConfig, backend: str, **more: Any) -> tuple[Any, list[Tensor]]:
    """(output, gradients of hidden, weight and bias) of the op."""
    leaves = [x.detach().requires_grad_() for x in case.head()]
    hidden, weight, bias = leaves
    inputs = {**row_inputs(case), **references(case, config), **more}
    out = pf.linear_policy_loss(hidden, weight, bias=bias, **inputs, config=config, backend=backend)
    return out, list(torch.autograd.grad(out.loss, leaves))


def run_materialized(
    loss_of: Any, case: LinearCase, config: pf.PolicyLossConfig, softcap: float | None, **more: Any
) -> tuple[Any, list[Tensor]]:
    """(output, gradients) of a loss of the materialized logits; ``loss_of`` takes the inputs of ``policy_loss``."""
    leaves = [x.detach().requires_grad_() for x in case.head()]
    reference = references(case, config)
    if config.kl_estimator == "full":
        reference = {"ref_logits": logits_of(case.head("ref_"), softcap)}
    logits = logits_of(tuple(leaves), softcap)
    out = loss_of(logits, **row_inputs(case, **more), **reference, config=config)
    return out, list(torch.autograd.grad(out if isinstance(out, Tensor) else out.loss, leaves))


class LinearTruth(NamedTuple):
    """The oracle's answer about the logits, and the gradients of hidden, weight and bias."""

    policy: oracles.PolicyTruth
    gradients: list[np.ndarray]


def truth(case: LinearCase, config: pf.PolicyLossConfig, softcap: float | None, **more: Any) -> LinearTruth:
    """The oracle on float64 logits, and the chain rule down to the head."""
    hidden, weight, bias = (x.double().numpy() for x in case.head())
    x = hidden.reshape(-1, D) @ weight.T + bias
    logits, slope = x, np.ones_like(x)
    if softcap is not None:
        logits, slope = softcap * np.tanh(x / softcap), np.cosh(x / softcap) ** -2.0
    ref_logits = logits_of(tuple(part.double() for part in case.head("ref_")), softcap)
    rows = case.rows._replace(logits=torch.from_numpy(logits), ref_logits=ref_logits)
    policy = policy_cases.truth(rows, config, **more)
    dx = policy.grad * slope
    return LinearTruth(policy, [dx @ weight, dx.T @ hidden.reshape(-1, D), dx.sum(0)])


def doubled_error(plain: Tensor, theirs: Any) -> Tensor:
    """Eager's result, twice as far from the truth: what the tolerance rule then allows the weight's gradient of several
    chunks in bfloat16. A CPU rounds each chunk's part of it before it is added in float32, as well as the sum.
    """
    return 2 * plain.double() - torch.as_tensor(theirs).reshape(plain.shape)


def check(
    case: LinearCase, config: pf.PolicyLossConfig, backend: str, softcap: float | None = None, **more: Any
) -> None:
    """Loss, gradients and per-token results obey the tolerance rule, with NaN in uncounted positions."""
    dtype = case.hidden.dtype
    options = {k: more.pop(k) for k in ("chunk_size",) if k in more}
    expected = truth(case, config, softcap, **more)
    loss, eager_gradients = run_materialized(eager.policy_loss, case, config, softcap, **more)
    out, gradients = run(hide_uncounted(case), config, backend, softcap=softcap, **more, **options)
    for name, ours, theirs, plain in zip(LEAVES, gradients, expected.gradients, eager_gradients, strict=True):
        assert ours.dtype == dtype
        if name == "weight" and dtype == torch.bfloat16 and options.get("chunk_size") is not None:
            plain = doubled_error(plain, theirs)
        assert_near_truth(ours, theirs, plain, dtype=dtype, gradient=True)
    ref_logits = logits_of(case.head("ref_"), softcap)
    stats = eager.token_stats(logits_of(case.head(), softcap), case.rows.targets, ref_logits, config.temperature)
    plain_stats = [x.masked_fill(~case.rows.mask, 0.0) for x in stats]
    found = (expected.policy.logprobs, expected.policy.entropy, expected.policy.kl)
    for name, ours, theirs, plain in zip(out.per_token._fields, out.per_token, found, plain_stats, strict=True):
        if name != "kl" or config.kl_estimator == "full":
            assert_near_truth(ours, theirs, plain, dtype=dtype)
    # The tokens' errors may cancel in eager's one number by luck: it is taken to be as far off as a log-probability.
    token_error = (plain_stats[0].double().flatten() - torch.from_numpy(found[0])).abs().max()
    assert_near_truth(out.loss, expected.policy.loss, loss + token_error, dtype=dtype)
