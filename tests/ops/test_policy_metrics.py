"""Each metric of policy_loss by its definition, on six tokens with chosen ratios."""

import math

import pytest
import torch

import ppo_fast as pf
from tests.helpers import each_backend

#            below clip   inside       above clip   far above    masked       above, A > 0
RATIOS = torch.tensor([[0.5, 1.1, 1.5, 4.0, 9.0, 1.5]])
ADVANTAGES = torch.tensor([[-1.0, 1.0, -1.0, -2.0, 5.0, 1.0]])
MASK = torch.tensor([[True, True, True, True, False, True]])
COUNTED = RATIOS[MASK]
LOGITS = torch.tensor([[[1.0, 0.0, -1.0]]]).expand(1, 6, 3).contiguous()
TARGETS = torch.zeros(1, 6, dtype=torch.long)
LOGPROBS = torch.log_softmax(LOGITS, -1)[..., 0]
REF = LOGPROBS - torch.tensor([[0.5, -0.5, 0.25, 0.0, 9.0, 1.0]])
# min(r*A, clip(r)*A): the first is held at 0.8 * -1, the last at 1.2 * 1; the far one is bounded by 3 * -2.
OBJECTIVES = [-0.8, 1.1, -1.5, -6.0, 1.2]


def metrics(backend: str, **changes: object) -> dict[str, float]:
    """The metrics of the six tokens."""
    options = {"dual_clip": 3.0, **changes.pop("options", {})}
    out = pf.policy_loss(
        LOGITS,
        TARGETS,
        LOGPROBS - RATIOS.log(),
        ADVANTAGES,
        MASK,
        config=pf.PolicyLossConfig(**options),
        ref_logprobs=REF,
        backend=backend,
        **changes,
    )
    return {name: value.item() for name, value in out.metrics.items()}


DEFINITIONS = {
    "policy_loss": -sum(OBJECTIVES) / 5,
    "entropy": torch.distributions.Categorical(logits=LOGITS[0, 0]).entropy().item(),
    "kl": sum(math.exp(-d) - 1 + d for d in (0.5, -0.5, 0.25, 0.0, 1.0)) / 5,
    "approx_kl": sum(r - 1 - math.log(r) for r in COUNTED.tolist()) / 5,
    "clipfrac": 2 / 5,
    "dual_clipfrac": 1 / 5,
    "ratio_mean": sum(COUNTED.tolist()) / 5,
    "ratio_max": 4.0,
    "tokens": 5.0,
}


@each_backend("policy_loss")
@pytest.mark.parametrize("name", DEFINITIONS)
def test_definition(backend: str, name: str) -> None:
    assert metrics(backend)[name] == pytest.approx(DEFINITIONS[name], rel=1e-5)


@each_backend("policy_loss")
def test_the_metrics_are_these_and_in_this_order(backend: str) -> None:
    assert list(metrics(backend)) == list(DEFINITIONS)


@each_backend("policy_loss")
def test_only_policy_loss_follows_weights_and_denominator(backend: str) -> None:
    changed = metrics(backend, importance_weights=torch.full((1, 6), 2.0), denominator=10)
    assert changed.pop("policy_loss") == pytest.approx(DEFINITIONS["policy_loss"])
    others = {name: value for name, value in DEFINITIONS.items() if name != "policy_loss"}
    assert changed == pytest.approx(others, rel=1e-5)


@each_backend("policy_loss")
def test_coefficients_do_not_enter_policy_loss(backend: str) -> None:
    options = {"ent_coef": 0.5, "kl_coef": 0.5, "penalty_coef": 0.5}
    assert metrics(backend, options=options) == pytest.approx(DEFINITIONS, rel=1e-5)


@each_backend("policy_loss")
def test_under_the_sequence_ratio(backend: str) -> None:
    """clipfrac and ratio_* use the sequence's ratio, approx_kl stays per token."""
    ratio = math.exp(COUNTED.log().mean().item())
    got = metrics(backend, options={"ratio": "sequence"})
    assert got["ratio_mean"] == pytest.approx(ratio, rel=1e-5)
    assert got["ratio_max"] == pytest.approx(ratio, rel=1e-5)
    assert got["approx_kl"] == pytest.approx(DEFINITIONS["approx_kl"], rel=1e-5)
    # The common ratio is above 1.2: the two tokens with A > 0 are clipped.
    assert got["clipfrac"] == pytest.approx(2 / 5)


@each_backend("policy_loss")
def test_under_cispo(backend: str) -> None:
    """clipfrac counts every ratio outside the clip; the objective is clip(r) * A * logprob."""
    got = metrics(backend, options={"objective": "cispo", "dual_clip": None})
    weighted = sum(r * a for r, a in zip((0.8, 1.1, 1.2, 1.2, 1.2), ADVANTAGES[MASK].tolist(), strict=True))
    changed = {"policy_loss": -weighted * LOGPROBS[0, 0].item() / 5, "clipfrac": 4 / 5, "dual_clipfrac": 0.0}
    assert got == pytest.approx({**DEFINITIONS, **changed}, rel=1e-5)


@each_backend("policy_loss")
@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("k1", (0.5 - 0.5 + 0.25 + 1.0) / 5), ("k2", (0.25 + 0.25 + 0.0625 + 1.0) / 10)],
)
def test_kl_is_the_chosen_estimator(backend: str, estimator: str, expected: float) -> None:
    assert metrics(backend, options={"kl_estimator": estimator})["kl"] == pytest.approx(expected, rel=1e-5)
