"""Laws that hold for every input, on inputs that hypothesis chooses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ppo_fast as pf
from tests.helpers import assert_near_truth, assert_same, each_backend

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 40)
lengths = st.integers(1, 12)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal numbers on a grid of 1/64, so that adding a small integer is exact."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (64 * scale * x).round() / 64


def choose(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@each_backend("token_stats")
@given(seed=seeds, V=sizes, shift=st.integers(-1000, 1000))
def test_a_constant_added_to_all_logits_changes_nothing(backend: str, seed: int, V: int, shift: int) -> None:
    logits, targets = normal(seed, 3, V, scale=3.0), choose(seed, V, 3)
    plain, shifted = (pf.token_stats(x, targets, backend=backend) for x in (logits, logits + shift))
    for a, b in zip(shifted[:2], plain[:2], strict=True):
        assert_near_truth(a, b, dtype=torch.float32)


@each_backend("token_stats")
@given(seed=seeds, V=sizes, scale=st.sampled_from([0.0, 0.1, 3.0, 50.0]))
def test_bounds_of_log_probability_and_entropy(backend: str, seed: int, V: int, scale: float) -> None:
    logits, targets = normal(seed, 3, V, scale=scale), choose(seed, V, 3)
    stats = pf.token_stats(logits, targets, backend=backend)
    slack = 32 * torch.finfo(torch.float32).eps * max(1.0, math.log(V))
    assert (stats.logprobs <= slack).all()
    assert (stats.entropy >= -slack).all()
    assert (stats.entropy <= math.log(V) + slack).all()


@each_backend("token_stats")
@given(seed=seeds, V=sizes)
def test_temperature_divides_the_logits(backend: str, seed: int, V: int) -> None:
    logits, targets = normal(seed, 3, V), choose(seed, V, 3)
    cooled = pf.token_stats(logits, targets, temperature=0.5, backend=backend)
    for a, b in zip(cooled[:2], pf.token_stats(2 * logits, targets, backend=backend)[:2], strict=True):
        assert_near_truth(a, b, dtype=torch.float32)


@each_backend("token_stats")
@given(seed=seeds, V=sizes)
def test_kl_is_not_negative_and_zero_to_itself(backend: str, seed: int, V: int) -> None:
    logits, other, targets = normal(seed, 3, V), normal(seed + 1, 3, V), choose(seed, V, 3)
    assert not pf.token_stats(logits, targets, ref_logits=logits, backend=backend).kl.any()
    assert (pf.token_stats(logits, targets, ref_logits=other, backend=backend).kl >= -1e-6).all()


@each_backend("policy_loss")
@given(seed=seeds, T=lengths)
def test_a_ratio_of_one_gives_minus_the_mean_advantage(backend: str, seed: int, T: int) -> None:
    logits, targets, advantages = normal(seed, 2, T, 5), choose(seed, 5, 2, T), normal(seed + 1, 2, T)
    mask = normal(seed + 2, 2, T) < 0.5
    out = pf.policy_loss(logits, targets, None, advantages, mask, backend=backend)
    torch.testing.assert_close(out.loss, -pf.masked_mean(advantages, mask))
    assert out.metrics["clipfrac"] == out.metrics["dual_clipfrac"] == out.metrics["approx_kl"] == 0


@each_backend("policy_loss")
@given(seed=seeds, ratio=st.sampled_from(["token", "sequence"]))
def test_permuting_sequences_permutes_tokens_and_keeps_the_loss(backend: str, seed: int, ratio: str) -> None:
    B, T, V = 4, 3, 5
    inputs = [normal(seed, B, T, V), choose(seed, V, B, T), *(normal(seed + i, B, T) - 1.5 for i in (1, 2))]
    mask = normal(seed + 3, B, T) < 0.5
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed))
    config = pf.PolicyLossConfig(ratio=ratio, ent_coef=0.1, aggregation="seq-mean-token-mean")
    plain = pf.policy_loss(*inputs, mask, config=config, backend=backend)
    moved = pf.policy_loss(*(x[order] for x in inputs), mask[order], config=config, backend=backend)
    torch.testing.assert_close(moved.loss, plain.loss)
    assert_same(tuple(moved.per_token[:2]), tuple(x[order] for x in plain.per_token[:2]))


@given(seed=seeds, scale=st.sampled_from([1e-4, 1.0, 30.0]))
def test_k3_is_not_negative_and_zero_only_at_equality(seed: int, scale: float) -> None:
    logprobs = normal(seed, 20).double()
    ref = logprobs + scale * normal(seed + 1, 20)
    k3 = pf.kl_estimate(logprobs, ref)
    assert (k3 >= 0).all()
    assert torch.equal(k3 == 0, logprobs == ref)


@each_backend("gae")
@given(seed=seeds, T=lengths, gamma=st.floats(0, 1))
def test_lambda_zero_is_the_td_error(backend: str, seed: int, T: int, gamma: float) -> None:
    rewards, values, bootstrap = normal(seed, 2, T), normal(seed + 1, 2, T), normal(seed + 2, 2)
    advantages, _ = pf.gae(rewards, values, gamma=gamma, lam=0.0, bootstrap=bootstrap, backend=backend)
    after = torch.cat([values[:, 1:], bootstrap[:, None]], 1)
    torch.testing.assert_close(advantages, rewards + gamma * after - values)


@each_backend("gae")
@given(seed=seeds, T=lengths, gamma=st.floats(0, 1))
def test_lambda_one_is_the_return_minus_the_value(backend: str, seed: int, T: int, gamma: float) -> None:
    rewards, values, bootstrap = normal(seed, 2, T), normal(seed + 1, 2, T), normal(seed + 2, 2)
    advantages, returns = pf.gae(rewards, values, gamma=gamma, lam=1.0, bootstrap=bootstrap, backend=backend)
    powers = gamma ** (torch.arange(T + 1)[None] - torch.arange(T)[:, None]).clamp(min=0).double()
    weights = powers * (torch.arange(T + 1)[None] >= torch.arange(T)[:, None])
    discounted = torch.cat([rewards, bootstrap[:, None]], 1).double() @ weights.T
    assert_near_truth(returns, discounted, dtype=torch.float32)
    assert_near_truth(advantages, discounted - values, dtype=torch.float32)


@each_backend("gae")
@given(seed=seeds, mode=st.sampled_from(["carry", "zero"]))
def test_permuting_sequences_permutes_advantages(backend: str, seed: int, mode: str) -> None:
    inputs = {"rewards": normal(seed, 5, 7), "values": normal(seed + 1, 5, 7), "bootstrap": normal(seed + 2, 5)}
    inputs |= {"mask": normal(seed + 3, 5, 7) < 0.5, "dones": normal(seed + 4, 5, 7) > 1}
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    plain = pf.gae(**inputs, mask_mode=mode, backend=backend)
    moved = pf.gae(**{k: x[order] for k, x in inputs.items()}, mask_mode=mode, backend=backend)
    assert_same(moved, tuple(x[order] for x in plain))


@given(seed=seeds, N=st.integers(2, 40), mean=st.sampled_from([0.0, 5.0]))
def test_whitened_elements_have_mean_zero_and_variance_one(seed: int, N: int, mean: float) -> None:
    x, mask = normal(seed, N).double() + mean, torch.arange(N) < max(2, N // 2)
    white = pf.whiten(x, mask)
    assert pf.masked_mean(white, mask).item() == pytest.approx(0, abs=1e-9)
    if x[mask].std() > 0.1:
        assert white[mask].var().item() == pytest.approx(1, rel=1e-5)


@given(seed=seeds, N=lengths, shift=st.integers(-50, 50))
def test_preferences_see_differences_alone(seed: int, N: int, shift: int) -> None:
    chosen, rejected, ref = (normal(seed + i, N).double() for i in range(3))
    plain = pf.preference_loss(chosen, rejected)
    assert_same(pf.preference_loss(chosen + shift, rejected + shift).loss, plain.loss)
    assert_same(
        pf.dpo_loss(chosen + shift, rejected, ref + shift, ref).loss, pf.dpo_loss(chosen, rejected, ref, ref).loss
    )
    # log(1 + e^-x) - log(1 + e^x) = -x
    swapped = pf.preference_loss(rejected, chosen)
    assert (swapped.loss - plain.loss).item() == pytest.approx(plain.metrics["margin"].item(), abs=1e-12)


@each_backend("value_loss")
@given(seed=seeds, clip=st.floats(0.01, 2))
def test_clipping_never_lowers_the_value_loss(backend: str, seed: int, clip: float) -> None:
    values, returns, old = (normal(seed + i, 3, 4) for i in range(3))
    plain = pf.value_loss(values, returns, None, backend=backend)
    clipped = pf.value_loss(values, returns, None, old_values=old, clip=clip, backend=backend)
    assert clipped.loss >= plain.loss
    assert (clipped.loss > plain.loss) == (clipped.metrics["clipfrac"] > 0)
