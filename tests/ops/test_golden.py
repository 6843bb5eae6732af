"""Golden vectors in exact and 50-digit arithmetic, met by float64 to 1e-12."""

from collections.abc import Sequence
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests.helpers import each_case

getcontext().prec = 50
LOGITS = [[0.5, -1.25, 2.0, 0.125], [-3.0, 4.5, 0.75, 4.25], [1.0, 1.0, -2.5, 0.0]]
REFERENCE = [[0.25, -1.0, 1.5, 0.5], [-2.0, 4.0, 1.0, 3.75], [0.5, 1.5, -2.0, 0.25]]
TARGETS = [2, 3, 0]
OLD, ADVANTAGES = [-1.0, -0.75, -0.5], [1.5, -2.0, 0.75]
TEMPERATURE = 0.75


def near(ours: Tensor, exact: Sequence[Decimal | Fraction]) -> None:
    """Each element is within 1e-12 of its exact value."""
    assert ours.dtype == torch.float64
    for a, b in zip(ours.flatten().tolist(), exact, strict=True):
        assert abs(Fraction(a) - Fraction(b)) < Fraction(1, 10**12)


def log_softmax(row: Sequence[float]) -> list[Decimal]:
    """log softmax(row / TEMPERATURE) to 50 digits."""
    z = [Decimal(x) / Decimal(TEMPERATURE) for x in row]
    lse = sum(x.exp() for x in z).ln()
    return [x - lse for x in z]


U = [log_softmax(row) for row in LOGITS]
W = [log_softmax(row) for row in REFERENCE]
P = [[x.exp() for x in u] for u in U]
LOGPROBS = [u[t] for u, t in zip(U, TARGETS, strict=True)]
ENTROPY = [-sum(p * x for p, x in zip(ps, u, strict=True)) for ps, u in zip(P, U, strict=True)]
KL = [sum(p * (x - y) for p, x, y in zip(*rows, strict=True)) for rows in zip(P, U, W, strict=True)]


def pull_back(i: int, g: Decimal, g_entropy: Decimal, g_kl: Decimal) -> list[Decimal]:
    """d/dlogits of g*logprob + g_entropy*H + g_kl*KL of row i, term by term."""
    grad = []
    for j, (p, u, w) in enumerate(zip(P[i], U[i], W[i], strict=True)):
        d_logprob = Decimal(int(j == TARGETS[i])) - p
        d_entropy = -p * (u + ENTROPY[i])
        d_kl = p * (u - w - KL[i])
        grad.append((g * d_logprob + g_entropy * d_entropy + g_kl * d_kl) / Decimal(TEMPERATURE))
    return grad


def as_double(rows: Sequence[object]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@each_case("token_stats", [torch.float64])
def test_token_stats(backend: str, dtype: torch.dtype) -> None:
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    stats = pf.token_stats(
        logits,
        torch.tensor(TARGETS),
        ref_logits=torch.tensor(REFERENCE, dtype=dtype),
        temperature=TEMPERATURE,
        backend=backend,
    )
    for ours, exact in zip(stats, (LOGPROBS, ENTROPY, KL), strict=True):
        near(ours, exact)
    (stats.logprobs + 2 * stats.entropy - 3 * stats.kl).sum().backward()
    near(logits.grad, [x for i in range(3) for x in pull_back(i, Decimal(1), Decimal(2), Decimal(-3))])


@each_case("policy_loss", [torch.float64])
def test_policy_loss(backend: str, dtype: torch.dtype) -> None:
    """Row 0 is clipped above (r = 2.07, A > 0), row 1 below nothing (A < 0), row 2 within the clip; all terms on."""
    low, high, penalty, ent_coef, kl_coef = (Decimal(x) for x in (0.25, 0.5, 0.125, 0.0625, 0.5))
    loss, grad, bounded = Decimal(0), [], []
    for i, (old, a) in enumerate(zip(OLD, ADVANTAGES, strict=True)):
        log_r = LOGPROBS[i] - Decimal(old)
        r, advantage = log_r.exp(), Decimal(a)
        held = min(max(r, 1 - low), 1 + high)
        is_clipped = held * advantage < r * advantage
        bounded.append(is_clipped)
        objective = min(r * advantage, held * advantage)
        loss += -objective + penalty * (r - 1 - log_r) + kl_coef * KL[i] - ent_coef * ENTROPY[i]
        slope = (Decimal(0) if is_clipped else -r * advantage) + penalty * (r - 1)
        grad += pull_back(i, slope / 3, -ent_coef / 3, kl_coef / 3)
    assert bounded == [True, False, False]
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    config = pf.PolicyLossConfig(
        clip_low=0.25,
        clip_high=0.5,
        penalty_coef=0.125,
        ent_coef=0.0625,
        kl_coef=0.5,
        kl_estimator="full",
        temperature=TEMPERATURE,
    )
    out = pf.policy_loss(
        logits,
        torch.tensor(TARGETS),
        as_double(OLD),
        as_double(ADVANTAGES),
        None,
        config=config,
        ref_logits=as_double(REFERENCE),
        backend=backend,
    )
    out.loss.backward()
    near(out.loss, [loss / 3])
    near(logits.grad, grad)
    assert out.metrics["clipfrac"] == 1 / 3


@each_case("value_loss", [torch.float64])
def test_value_loss(backend: str, dtype: torch.dtype) -> None:
    values = torch.tensor([1.5, -0.25, 2.0, 0.5], dtype=dtype, requires_grad=True)
    out = pf.value_loss(
        values,
        as_double([1.0, 1.0, 1.75, 0.25]),
        None,
        old_values=as_double([1.25, -1.0, 2.125, 0.0]),
        clip=0.375,
        backend=backend,
    )
    out.loss.backward()
    # Errors 1/2, -5/4, 1/4, 1/4; only the second (held at -5/8) and the fourth (at 3/8) leave the clip,
    # and only the second is larger there.
    near(out.loss, [(Fraction(1, 4) + Fraction(13, 8) ** 2 + Fraction(1, 16) + Fraction(1, 16)) / 8])
    near(values.grad, [Fraction(1, 8), Fraction(0), Fraction(1, 16), Fraction(1, 16)])
    assert out.metrics["clipfrac"] == 0.25


REWARDS = [0.5, -1.0, 0.25, 2.0, 1.0, -0.5]
VALUES = [1.0, 0.5, -0.75, 0.125, 2.0, 1.5]
COUNTED = [True, True, False, True, True, True]
DONES = [False, True, True, False, False, False]
GAMMA, LAM, BOOTSTRAP = 0.875, 0.625, 3.0


def exact_gae(mode: str) -> tuple[list[Fraction], list[Fraction]]:
    """The recursion in rational arithmetic."""
    gamma, decay = Fraction(GAMMA), Fraction(GAMMA) * Fraction(LAM)
    advantage, after = Fraction(0), Fraction(BOOTSTRAP)
    advantages, returns = [], []
    for r, v, counted, done in reversed(list(zip(REWARDS, VALUES, COUNTED, DONES, strict=True))):
        if counted or mode == "zero":
            reward, value = (Fraction(r), Fraction(v)) if counted else (Fraction(0), Fraction(0))
            go_on = Fraction(int(not done))
            advantage = reward + gamma * go_on * after - value + decay * go_on * advantage
            after = value
        advantages.insert(0, advantage if counted else Fraction(0))
        returns.insert(0, advantage + Fraction(v) if counted else Fraction(0))
    return advantages, returns


@each_case("gae", [torch.float64])
@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_gae(backend: str, dtype: torch.dtype, mode: str) -> None:
    rewards, values = torch.tensor(REWARDS, dtype=dtype), as_double(VALUES)
    options = {"gamma": GAMMA, "lam": LAM, "mask_mode": mode, "backend": backend, "bootstrap": as_double([BOOTSTRAP])}
    mask, dones = torch.tensor(COUNTED), torch.tensor(DONES)
    padded = pf.gae(rewards[None], values[None], mask[None], dones=dones[None], **options)
    packed = pf.gae_packed(rewards, values, torch.tensor([0, 6]), mask=mask, dones=dones, **options)
    for results in (padded, packed):
        for ours, exact in zip(results, exact_gae(mode), strict=True):
            near(ours, exact)


def test_preferences() -> None:
    chosen, rejected, margin = [1.5, -0.25], [0.5, 2.0], [0.25, 0.0]
    gaps = [Decimal(c) - Decimal(r) for c, r in zip(chosen, rejected, strict=True)]

    def exact(wanted: Sequence[Decimal]) -> Decimal:
        return sum((1 + (-x).exp()).ln() for x in wanted) / 2

    out = pf.preference_loss(as_double(chosen), as_double(rejected), margin=as_double(margin))
    near(out.loss, [exact([gap - Decimal(m) for gap, m in zip(gaps, margin, strict=True)])])
    near(out.metrics["margin"], [sum(gaps) / 2])
    beta, ref = Decimal("0.125"), as_double([0.5, -1.0])
    out = pf.dpo_loss(as_double(chosen), as_double(rejected), ref, as_double([0.0, 0.0]), beta=0.125)
    rewards = [gaps[0] - Decimal("0.5"), gaps[1] + 1]
    near(out.loss, [exact([beta * r for r in rewards])])
    near(out.metrics["reward_chosen"], [beta * (Decimal("1.0") + Decimal("0.75")) / 2])


def test_masked_functions() -> None:
    x = [Fraction(3, 4), Fraction(-5, 2), Fraction(9, 8)]
    tensor, mask = as_double([0.75, -2.5, 99.0, 1.125]), torch.tensor([True, True, False, True])
    mean = sum(x) / 3
    near(pf.masked_mean(tensor, mask), [mean])
    variance = sum((v - mean) ** 2 for v in x) / 2 + Fraction(1e-8)
    scale = 1 / (Decimal(variance.numerator) / Decimal(variance.denominator)).sqrt()
    near(pf.whiten(tensor, mask)[mask], [(v - mean) * Fraction(scale) for v in x])
    near(pf.whiten(tensor, mask, shift_mean=False)[mask], [(v - mean) * Fraction(scale) + mean for v in x])
    d = Decimal("-0.25") - Decimal("-1.5")
    for estimator, exact in (("k1", -d), ("k2", d * d / 2), ("k3", d.exp() - 1 - d)):
        near(pf.kl_estimate(as_double([-1.5]), as_double([-0.25]), estimator), [exact])
