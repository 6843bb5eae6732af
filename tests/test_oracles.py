"""The oracles against finite differences of themselves and against numbers done by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests import oracles

RNG = np.random.default_rng(0)
CONFIG = {
    "clip_low": 0.2,
    "clip_high": 0.3,
    "dual_clip": 2.0,
    "penalty_coef": 0.1,
    "ent_coef": 0.05,
    "kl_coef": 0.2,
    "temperature": 0.7,
    "aggregation": "seq-mean-token-mean",
}


def numerical_gradient(f, x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        grad[i] = (f(up) - f(down)) / (2 * step)
    return grad


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_policy_gradient_is_the_derivative_of_the_policy_loss(ratio: str, estimator: str) -> None:
    config = SimpleNamespace(**CONFIG, objective="clip", ratio=ratio, kl_estimator=estimator)
    logits, targets = RNG.normal(size=(8, 4)), RNG.integers(4, size=8)
    old, advantages, ref = (RNG.normal(size=8) - shift for shift in (1.4, 0.0, 1.4))
    counted = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)
    reference = {"ref_logits": RNG.normal(size=(8, 4))} if estimator == "full" else {"ref_logprobs": ref}

    def run(x: np.ndarray) -> oracles.PolicyTruth:
        return oracles.policy_loss(
            x, targets, old, advantages, counted, oracles.packed_segments([0, 5, 5, 8]), config, **reference
        )

    np.testing.assert_allclose(run(logits).grad, numerical_gradient(lambda x: run(x).loss, logits), atol=1e-8)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_cispo_gradient_is_the_derivative_of_its_loss_at_constant_ratios(ratio: str) -> None:
    fields = {**CONFIG, "dual_clip": None, "penalty_coef": 0.0}
    config = SimpleNamespace(**fields, objective="cispo", ratio=ratio, kl_estimator="k2")
    logits, targets = RNG.normal(size=(8, 4)), RNG.integers(4, size=8)
    gap, advantages, ref = RNG.normal(size=(3, 8))
    counted, segments = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool), oracles.packed_segments([0, 5, 5, 8])

    def run(x: np.ndarray) -> oracles.PolicyTruth:
        """The old log-probabilities move with the new ones."""
        logprobs = np.array([oracles.log_softmax(row, 0.7)[t] for row, t in zip(x, targets, strict=True)])
        return oracles.policy_loss(x, targets, logprobs - gap, advantages, counted, segments, config, ref - 1.4)

    assert run(logits).metrics["clipfrac"] > 0
    np.testing.assert_allclose(run(logits).grad, numerical_gradient(lambda x: run(x).loss, logits), atol=1e-8)


def test_value_gradient_is_the_derivative_of_the_value_loss() -> None:
    values, returns, old = RNG.normal(size=(3, 6))
    counted, segments = np.array([1, 1, 0, 1, 1, 1], bool), oracles.padded_segments(2, 3)

    def run(x: np.ndarray) -> tuple[float, float, np.ndarray]:
        return oracles.value_loss(x, returns, counted, segments, old, 0.3, "seq-mean-token-mean")

    np.testing.assert_allclose(run(values)[2], numerical_gradient(lambda x: run(x)[0], values), atol=1e-8)


def test_preference_gradients_are_the_derivatives_of_the_losses() -> None:
    chosen, rejected, ref_chosen, ref_rejected = RNG.normal(size=(4, 5))

    def bradley_terry(x: np.ndarray) -> oracles.PreferenceTruth:
        return oracles.preference_loss(x, rejected, np.abs(ref_chosen))

    def dpo(x: np.ndarray) -> oracles.PreferenceTruth:
        return oracles.dpo_loss(x, rejected, ref_chosen, ref_rejected, 0.3)

    for run in (bradley_terry, dpo):
        np.testing.assert_allclose(run(chosen).grad, numerical_gradient(lambda x, f=run: f(x).loss, chosen), atol=1e-8)


def test_gae_by_hand() -> None:
    advantages, returns = oracles.gae(
        np.array([1.0, 2.0]),
        np.array([0.5, 0.25]),
        np.ones(2, bool),
        np.zeros(2, bool),
        np.array([4.0]),
        [[0, 1]],
        0.5,
        0.5,
        "carry",
    )
    # delta = (1 + 0.5*0.25 - 0.5, 2 + 0.5*4 - 0.25) and gamma*lam = 0.25
    assert advantages.tolist() == [0.625 + 0.25 * 3.75, 3.75]
    assert returns.tolist() == [0.625 + 0.25 * 3.75 + 0.5, 4.0]


def test_statistics_of_a_uniform_row() -> None:
    u = oracles.log_softmax(np.full(4, 7.0), 2.0)
    np.testing.assert_allclose([u[0], oracles.entropy(u), oracles.kl(u, u)], [-np.log(4), np.log(4), 0.0], atol=1e-15)
