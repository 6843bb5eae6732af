"""The per-token kernels over several programs, the totals of their partial sums, and the scans over several blocks."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.triton import gae, policy_loss, totals, tuning, value_loss
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import GaeInputs, ValueInputs
from ppo_fast.ops._core.results import RowStats
from tests.helpers import assert_near_truth, assert_same

SHAPE = (3, 200)  # three programs of 256 tokens, the last of them not full
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


def _double(group: Any) -> Any:
    return type(group)(*(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in group))


def _inputs(
    estimator: str, *, masked: bool, penalty: bool, aggregation: str, objective: str
) -> tuple[RowStats, Tensor | None, PolicyInputs]:
    """Arguments of policy_loss_from_stats, NaN where masked; without penalty also gaps beyond +-20."""
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
    stats = RowStats(logprobs, torch.rand(SHAPE), reference_terms[0], torch.empty(0), torch.empty(0))
    policy = PolicyInputs(
        *(old, advantages, reference_terms[1], weights),
        *(None, torch.tensor(50.0), coef if penalty else None, coef * 0.1, coef),
        *(0.2, 0.28, 1.5, "token", estimator, aggregation, objective),
    )
    return stats, mask, policy


def _compare(stats: RowStats, mask: Tensor | None, policy: PolicyInputs) -> None:
    """The kernel's results against the reference's in float64, no further off than those in float32."""
    ours = policy_loss.policy_loss_from_stats(stats, mask, policy)
    truth = reference.policy_loss_from_stats(_double(stats), mask, _double(policy))
    eager = reference.policy_loss_from_stats(stats, mask, policy)
    for name, got, expected, float32 in zip(ours._fields, ours, truth, eager, strict=True):
        if got is None:
            assert expected is None, name
            continue
        assert got.shape == expected.shape, name
        if got.numel():
            assert_near_truth(got, expected, float32, dtype=torch.float32, gradient=name.startswith("grad_"))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
@pytest.mark.parametrize("masked", [False, True])
def test_policy_loss_from_stats(estimator: str, masked: bool) -> None:
    kinds = [(penalty, kind, "clip") for penalty, kind in zip((False, True, True), AGGREGATIONS, strict=True)]
    for penalty, aggregation, objective in (*kinds, (False, "token-mean", "cispo"), (True, "token-mean", "cispo")):
        options = {"penalty": penalty, "aggregation": aggregation, "objective": objective}
        _compare(*_inputs(estimator, masked=masked, **options))


# Sequences of two blocks, of one token and of none, and one after which nothing counts.
OFFSETS = torch.tensor([0, 0, 300, 301, 301, 450, 600], dtype=torch.int32)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_policy_loss_of_sequences(packed: bool, aggregation: str) -> None:
    """A program for each sequence; without a denominator the totals divide by the number of those that count."""
    stats, mask, policy = _inputs("k3", masked=True, penalty=True, aggregation=aggregation, objective="clip")
    assert mask is not None
    if packed:
        mask.view(-1)[450:] = False
        flat = {name: getattr(policy, name).view(1, -1) for name in ("old_logprobs", "advantages", "ref_logprobs")}
        policy = policy._replace(cu_seqlens=OFFSETS, importance_weights=policy.importance_weights.view(1, -1), **flat)
        stats = RowStats(*(x.view(1, -1) if x.numel() else x for x in stats))
        mask = mask.view(1, -1)
    policy = policy._replace(ent_coef=None)
    five = torch.tensor(5.0)
    pairs = ("token", "clip", None), ("token", "cispo", five), ("sequence", "cispo", None), ("sequence", "clip", five)
    for ratio, objective, denominator in pairs:
        _compare(stats, mask, policy._replace(ratio=ratio, objective=objective, denominator=denominator))
    far = policy._replace(ratio="sequence", old_logprobs=policy.old_logprobs - 30.0, denominator=None)
    _compare(stats, mask, far._replace(objective="cispo" if packed else "clip"))


@pytest.mark.parametrize("aggregation", AGGREGATIONS[1:])
@pytest.mark.parametrize("packed", [False, True])
def test_value_loss_of_sequences(packed: bool, aggregation: str) -> None:
    shape, offsets = ((1, 600), OFFSETS) if packed else (SHAPE, None)
    values, returns, old, mask = torch.randn(shape), torch.randn(shape), torch.randn(shape), torch.rand(shape) > 0.3
    mask.view(-1)[400:] = False
    returns[~mask] = math.nan
    for clip, denominator in ((None, None), (0.2, None), (0.2, torch.tensor(5.0))):
        inputs = ValueInputs(values, returns, mask, old, offsets, denominator, clip, aggregation)
        truth, float32 = reference.value_loss(_double(inputs)), reference.value_loss(inputs)
        for got, expected, plain in zip(value_loss.value_loss(inputs), truth, float32, strict=True):
            assert_near_truth(got, expected, plain, dtype=torch.float32)


def test_policy_loss_from_stats_without_options() -> None:
    x, none = torch.randn(SHAPE), torch.empty(0)
    options = (math.inf, math.inf, math.inf, "token", "k3", "token-mean", "clip")
    policy = PolicyInputs(None, x, None, None, None, None, None, None, None, *options)
    ours = policy_loss.policy_loss_from_stats(RowStats(x, x, none, none, none), None, policy)
    assert_near_truth(ours.loss, -x.double().mean(), dtype=torch.float32)
    assert_near_truth(ours.grad_logprobs, -x.double() / x.numel(), dtype=torch.float32, gradient=True)
    assert [ours.kl, ours.ref_lse, ours.grad_entropy, ours.grad_kl] == [None] * 4


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_loss(clip: float | None, dtype: torch.dtype) -> None:
    values, returns, mask = torch.randn(SHAPE).to(dtype), torch.randn(SHAPE), torch.rand(SHAPE) > 0.3
    old = values.float() + torch.randn(SHAPE) * 0.3
    values[~mask] = math.nan
    options = (None, torch.tensor(7.0), clip, "seq-mean-token-mean")
    inputs = ValueInputs(values, returns, mask, old, *options)
    ours, truth = value_loss.value_loss(inputs), reference.value_loss(_double(inputs))
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
