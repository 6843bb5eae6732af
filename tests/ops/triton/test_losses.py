"""The per-token kernels over several programs, the totals of their partial sums, and the scans over several blocks."""

import math

import pytest
import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.triton import gae, policy_loss, totals, tuning, value_loss
from ppo_fast.ops._core.inputs import GaeInputs
from tests.helpers import assert_near_truth, assert_same

SHAPE = (3, 200)  # three programs of 256 tokens, the last of them not full
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def _double(x: object) -> object:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _terms(estimator: str, *, masked: bool, penalty: bool, aggregation: str) -> tuple[object, ...]:
    """Arguments of policy_terms, NaN where masked; without penalty also log ratios and reference gaps beyond +-20."""
    logprobs, advantages = -torch.rand(SHAPE) * 3, torch.randn(SHAPE)
    old, ref = logprobs - torch.randn(SHAPE) * 0.3, logprobs - torch.randn(SHAPE) * 0.1
    if not penalty:
        old[0, :3] += torch.tensor([25.0, -25.0, 20.0])
        ref[0, 3:6] += torch.tensor([25.0, -25.0, 20.0])
    mask = torch.rand(SHAPE) > 0.3 if masked else None
    weights = torch.rand(SHAPE)
    if mask is not None:
        for x in (old, ref, advantages, weights):
            x[~mask] = math.nan
    full = estimator == "full"
    coef = torch.tensor(0.1)
    reference_terms = (torch.rand(SHAPE), None) if full else (torch.empty(0), ref)
    return (
        *(logprobs, torch.rand(SHAPE), reference_terms[0], mask, old, advantages, reference_terms[1], weights),
        *(None, torch.tensor(50.0), coef if penalty else None, coef * 0.1, coef),
        *(0.2, 0.28, 1.5, "token", estimator, aggregation),
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
@pytest.mark.parametrize("masked", [False, True])
def test_policy_terms(estimator: str, masked: bool) -> None:
    for penalty, aggregation in zip((False, True, True), AGGREGATIONS, strict=True):
        arguments = _terms(estimator, masked=masked, penalty=penalty, aggregation=aggregation)
        ours = policy_loss.policy_terms(*arguments)  # type: ignore[arg-type]
        truth = reference.policy_terms(*(_double(x) for x in arguments))  # type: ignore[arg-type]
        eager = reference.policy_terms(*arguments)  # type: ignore[arg-type]
        for name, got, expected, float32 in zip(ours._fields, ours, truth, eager, strict=True):
            assert got.shape == expected.shape, name
            if got.numel():
                assert_near_truth(got, expected, float32, dtype=torch.float32, gradient=name.startswith("d_"))


def test_policy_terms_without_options() -> None:
    x, none = torch.randn(SHAPE), torch.empty(0)
    arguments = (x, x, none, None, None, x, None, None, None, None, None, None, None)
    options = (math.inf, math.inf, math.inf, "token", "k3", "token-mean")
    ours = policy_loss.policy_terms(*arguments, *options)
    assert_near_truth(ours.loss, -x.double().mean(), dtype=torch.float32)
    assert_near_truth(ours.d_logprobs, -x.double() / x.numel(), dtype=torch.float32, gradient=True)
    assert [t.numel() for t in (ours.kl, ours.d_entropy, ours.d_kl)] == [0, 0, 0]


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_loss(clip: float | None, dtype: torch.dtype) -> None:
    values, returns, mask = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE), torch.rand(SHAPE) > 0.3
    old = values.float() + torch.randn(SHAPE) * 0.3
    values[~mask] = math.nan
    options = (None, torch.tensor(7.0), clip, "seq-mean-token-mean")
    ours = value_loss.value_loss(values, returns, mask, old, *options)
    truth = reference.value_loss(values.double(), returns.double(), mask, old.double(), *options)
    for got, expected in zip(ours, truth, strict=True):
        assert_near_truth(got, expected, dtype=torch.float32)


def test_totals_of_many_programs() -> None:
    """Two sums, three means over the tokens of the last row, one of which is a maximum with 0."""
    partials = torch.randn(6, 600)
    partials[5] = torch.randint(0, 9, (600,)).float()
    loss, metrics = totals.totals(partials, maximum=3)
    sums = partials.double().sum(1)
    expected = torch.stack([sums[1], sums[2] / sums[5], partials[3].max().double(), sums[4] / sums[5], sums[5]])
    assert_near_truth(loss, sums[0], dtype=torch.float32)
    assert_near_truth(metrics, expected, dtype=torch.float32)


def test_totals_of_nothing_are_zero() -> None:
    loss, metrics = totals.totals(torch.empty(10, 0), maximum=8)
    assert loss == 0
    assert (metrics == 0).all()


@pytest.mark.parametrize("T", [1, 15, 16, 17, 40])
@pytest.mark.parametrize("mode", ["carry", "zero"])
def test_scans_over_block_borders(T: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "scan_tile", lambda steps: tuning.Tile(16, 1, 1))
    rewards, values = torch.randn(2, T, 6).transpose(1, 2).unbind()
    mask, dones = torch.rand(6, T) > 0.4, torch.rand(6, T) > 0.8
    mask[0], mask[1], dones[2] = True, False, False
    mask[3], mask[3, 4:30], dones[3] = True, False, False  # a whole block that passes the state on
    values = values.masked_fill(~mask, math.nan)
    arguments = (mask, torch.randn(6), dones, 0.97, 0.9, mode)
    truth = reference.gae(GaeInputs(rewards.double(), values.double(), None, *arguments))
    ours = gae.gae(GaeInputs(rewards, values, None, *arguments))
    for got, expected in zip(ours, truth, strict=True):
        assert_near_truth(got, expected, dtype=torch.float32)
    flat = GaeInputs(
        *(x.flatten() for x in (rewards, values)),
        torch.arange(0, 6 * T + 1, T, dtype=torch.int32),
        *(mask.flatten(), arguments[1], dones.flatten(), *arguments[3:]),
    )
    packed = gae.gae(flat)
    assert_same(packed, (ours[0].flatten(), ours[1].flatten()))


def test_packed_scan_stays_inside_its_buffers() -> None:
    rewards, values = torch.randn(2, 8)
    wild = torch.tensor([-5, 3, 1 << 40])
    inputs = GaeInputs(rewards, values, wild, None, None, None, 0.9, 0.9, "carry")
    expected = reference.gae(inputs._replace(cu_seqlens=torch.tensor([0, 3, 8])))
    torch.testing.assert_close(gae.gae(inputs), expected)


def test_an_episode_end_stops_infinities() -> None:
    rewards, values = torch.zeros(1, 20), torch.ones(1, 20)
    rewards[0, 15], values[0, 17], dones = math.inf, math.nan, torch.zeros(1, 20, dtype=torch.bool)
    dones[0, 10] = True
    advantages, _ = gae.gae(GaeInputs(rewards, values, None, None, None, dones, 0.9, 0.9, "carry"))
    assert advantages[0, :11].isfinite().all()
    assert not advantages[0, 11:16].isfinite().any()
