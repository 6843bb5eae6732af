"""One small call of every op with every kind of input, for the tests that hold for all ops alike."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests.helpers import INTERPRETED, backends_under_test

B, T, V, D = 3, 5, 11, 4
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
CU_SEQLENS = torch.tensor([0, 3, 3, 8, 11, 15])
ALL_TERMS = pf.PolicyLossConfig(dual_clip=2.0, penalty_coef=0.1, ent_coef=0.02, kl_coef=0.05, temperature=0.8)
SEQUENCES = pf.PolicyLossConfig(
    ratio="sequence", clip_low=0.01, kl_estimator="full", kl_coef=0.3, aggregation="seq-mean-token-mean"
)


class Example(NamedTuple):
    """A call.

    Attributes:
        op: its name in ``backends()``; "" for plain functions of torch, which take no backend.
        call: (inputs, backend keyword) -> what the op returns.
        inputs: the tensors, by argument name.
        leaf: the input that gets a gradient; None for the gae ops.
        masked: the inputs that may hold anything where the mask is False.
    """

    op: str
    call: Callable[..., Any]
    inputs: dict[str, Tensor]
    leaf: str | None
    masked: tuple[str, ...]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR)


def _rows(*names: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: _normal(*shape) for name in names}


_GENERATOR = torch.Generator().manual_seed(7)
_FLAT = MASK.flatten()
_TARGETS = torch.randint(V, (B, T), generator=_GENERATOR)
_LOGITS = {"logits": 2 * _normal(B, T, V), "mask": MASK}
_DONES = torch.rand((B, T), generator=_GENERATOR) < 0.3
_STATS = {**_LOGITS, "targets": _TARGETS}
_POLICY = {**_STATS, **_rows("old_logprobs", "ref_logprobs", "importance_weights", "advantages", shape=(B, T))}
_POLICY["old_logprobs"] = _POLICY["old_logprobs"] - 2.5
_PACKED = {k: v.flatten(0, 1) for k, v in _POLICY.items() if k != "ref_logprobs"}
_VALUE = {"mask": MASK, **_rows("values", "returns", "old_values", shape=(B, T))}
_GAE = {"mask": MASK, "dones": _DONES, **_rows("rewards", "values", shape=(B, T)), "bootstrap": _normal(B)}
_GAE_PACKED = {k: v.flatten() for k, v in _GAE.items() if k != "bootstrap"}
_HIDDEN = {"hidden": 2 * _normal(B, T, D), "weight": _normal(V, D), "bias": _normal(V)}
_REFERENCE = {"ref_hidden": _normal(B, T, D), "ref_weight": _normal(V, D), "ref_bias": _normal(V)}
_LINEAR = {**_HIDDEN, **{k: v for k, v in _POLICY.items() if k != "logits"}}
_PER_TOKEN = ("logits", "targets", "old_logprobs", "advantages", "importance_weights")

# The interpreter takes seconds for the passes of the filters; tests/ops/test_sample_tokens.py has them.
FILTERS: dict[str, Any] = {} if INTERPRETED else {"top_k": 7, "top_p": 0.9}

EXAMPLES: dict[str, Example] = {
    "token_logprobs": Example("token_logprobs", pf.token_logprobs, _STATS, "logits", ("logits", "targets")),
    "token_stats": Example(
        "token_stats",
        pf.token_stats,
        {**_STATS, "ref_logits": _normal(B, T, V)},
        "logits",
        ("logits", "targets", "ref_logits"),
    ),
    "entropy": Example("entropy", pf.entropy, _LOGITS, "logits", ("logits",)),
    "policy_loss": Example(
        "policy_loss",
        lambda **k: pf.policy_loss(**k, config=ALL_TERMS),
        _POLICY,
        "logits",
        (*_PER_TOKEN, "ref_logprobs"),
    ),
    "policy_loss-packed": Example(
        "policy_loss",
        lambda **k: pf.policy_loss(**k, config=SEQUENCES),
        {**_PACKED, "ref_logits": _normal(B * T, V), "cu_seqlens": CU_SEQLENS},
        "logits",
        (*_PER_TOKEN, "ref_logits"),
    ),
    "linear_token_stats": Example(
        "linear_token_stats",
        lambda **k: pf.linear_token_stats(**k, softcap=4.0, chunk_size=4),
        {**_HIDDEN, **_REFERENCE, "targets": _TARGETS, "mask": MASK},
        "hidden",
        ("hidden", "targets", "ref_hidden"),
    ),
    "linear_policy_loss": Example(
        "linear_policy_loss",
        lambda **k: pf.linear_policy_loss(**k, config=ALL_TERMS, chunk_size=4),
        _LINEAR,
        "hidden",
        ("hidden", *_PER_TOKEN[1:], "ref_logprobs"),
    ),
    "linear_policy_loss-packed": Example(
        "linear_policy_loss",
        lambda **k: pf.linear_policy_loss(**k, config=SEQUENCES, chunk_size=4),
        {
            **{k: v if k in ("weight", "bias") else v.flatten(0, 1) for k, v in _LINEAR.items() if k != "ref_logprobs"},
            "ref_hidden": _normal(B * T, D),
            "cu_seqlens": CU_SEQLENS,
        },
        "hidden",
        ("hidden", *_PER_TOKEN[1:], "ref_hidden"),
    ),
    "value_loss": Example(
        "value_loss",
        lambda **k: pf.value_loss(**k, clip=0.2),
        _VALUE,
        "values",
        ("values", "returns", "old_values"),
    ),
    "value_loss-packed": Example(
        "value_loss",
        lambda **k: pf.value_loss(**k, aggregation="seq-mean-token-mean"),
        {**{k: v.flatten() for k, v in _VALUE.items()}, "cu_seqlens": CU_SEQLENS},
        "values",
        ("values", "returns", "old_values"),
    ),
    "gae-carry": Example("gae", lambda **k: pf.gae(**k, gamma=0.97), _GAE, None, ("rewards", "values", "dones")),
    "gae-zero": Example(
        "gae", lambda **k: pf.gae(**k, gamma=0.97, mask_mode="zero"), _GAE, None, ("rewards", "values")
    ),
    "gae_packed": Example(
        "gae_packed",
        lambda **k: pf.gae_packed(**k, lam=0.9),
        {**_GAE_PACKED, "cu_seqlens": CU_SEQLENS, "bootstrap": _normal(5)},
        None,
        ("rewards", "values", "dones"),
    ),
    "sample_tokens": Example(
        "sample_tokens",
        lambda **k: pf.sample_tokens(**k, temperature=0.8, **FILTERS),
        {"logits": 2 * _normal(B, T, V), "keys": torch.arange(B * T * 3).view(B, T, 3)},
        None,
        (),
    ),
    "preference_loss": Example(
        "", pf.preference_loss, _rows("chosen_scores", "rejected_scores", "margin", shape=(B,)), "chosen_scores", ()
    ),
    "dpo_loss": Example(
        "",
        pf.dpo_loss,
        _rows("logprobs_chosen", "logprobs_rejected", "ref_chosen", "ref_rejected", shape=(B,)),
        "logprobs_chosen",
        (),
    ),
    "masked_mean": Example("", pf.masked_mean, {"x": _normal(B, T), "mask": MASK}, "x", ("x",)),
    "whiten": Example("", pf.whiten, {"x": _normal(B, T), "mask": MASK}, "x", ("x",)),
    "kl_estimate": Example("", pf.kl_estimate, _rows("logprobs", "ref_logprobs", shape=(B, T)), "logprobs", ()),
}


def each_example(*names: str) -> pytest.MarkDecorator:
    """Parametrize ``name, backend`` over examples (default: all) and the tested backends of their ops."""
    chosen = names or tuple(EXAMPLES)
    cases = [(n, b) for n in chosen for b in (backends_under_test(EXAMPLES[n].op) if EXAMPLES[n].op else ["plain"])]
    return pytest.mark.parametrize(("name", "backend"), cases, ids=["-".join(case) for case in cases])


def fresh_inputs(name: str, **changes: Tensor) -> dict[str, Tensor]:
    """Copies of an example's inputs, with its leaf requiring a gradient."""
    example = EXAMPLES[name]
    inputs = {k: v.clone() for k, v in {**example.inputs, **changes}.items()}
    if example.leaf is not None:
        inputs[example.leaf].requires_grad_()
    return inputs


def flatten(result: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor that an op returned, by a name."""
    if result is None:
        return {}
    if isinstance(result, Tensor):
        return {prefix: result}
    if hasattr(result, "_asdict"):
        result = result._asdict()
    pairs = result.items() if isinstance(result, dict) else enumerate(result)
    return {name: x for key, part in pairs for name, x in flatten(part, f"{prefix}.{key}").items()}


def run(name: str, backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The example's results by name."""
    example = EXAMPLES[name]
    keywords = {"backend": backend} if example.op else {}
    return flatten(example.call(**inputs, **keywords), name)


def upstream(results: dict[str, Tensor]) -> Tensor:
    """A scalar in which every differentiable element has its own weight."""
    parts = [x for x in results.values() if x.requires_grad]
    weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device) for x in parts]
    return sum((x * weight.view(x.shape)).sum() for x, weight in zip(parts, weights, strict=True))


def run_with_gradient(name: str, backend: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The example's results, and the gradient of :func:`upstream` in its leaf."""
    results = run(name, backend, inputs)
    leaf = EXAMPLES[name].leaf
    gradient = {} if leaf is None else {"grad": torch.autograd.grad(upstream(results), inputs[leaf])[0]}
    return {k: v.detach() for k, v in results.items()} | gradient
