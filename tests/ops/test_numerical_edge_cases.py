"""Traps that implementations of these losses fall into, one test each."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests import oracles
from tests.helpers import assert_near_truth, assert_same, each_backend, each_case, no_host_sync
from tests.ops.examples import EXAMPLES, fresh_inputs, run_with_gradient
from tests.ops.policy_cases import make_case, run

NINF = -torch.inf
BANNED = torch.tensor([[1.0, NINF, -2.0, NINF, 0.5], [NINF, NINF, 3.0, NINF, NINF]])
ALLOWED = BANNED > NINF


def stats_and_gradients(
    logits: Tensor, targets: Tensor, backend: str, ref_logits: Tensor | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """{statistic: (values, gradient of their sum)}."""
    found = {}
    for field in pf.TokenStats._fields:
        leaf = logits.detach().clone().requires_grad_()
        values = getattr(pf.token_stats(leaf, targets, ref_logits=ref_logits, backend=backend), field)
        if values is not None:
            found[field] = (values.detach(), torch.autograd.grad(values.sum(), leaf)[0])
    return found


@each_case("token_stats")
def test_minus_infinity_logits(backend: str, dtype: torch.dtype) -> None:
    """Banned words: the same numbers as without their columns, and gradient 0 there."""
    logits, targets = BANNED.to(dtype), torch.tensor([2, 2])
    reference = torch.where(ALLOWED, torch.randn(2, 5), NINF).to(dtype)
    found = stats_and_gradients(logits, targets, backend, reference)
    for i, target in enumerate((1, 0)):
        kept = ALLOWED[i]
        alone = stats_and_gradients(
            logits[i : i + 1, kept], torch.tensor([target]), backend, reference[i : i + 1, kept]
        )
        for field, (value, grad) in found.items():
            assert_near_truth(value[i], alone[field][0][0].double(), dtype=dtype)
            torch.testing.assert_close(grad[i, kept], alone[field][1][0])
            assert not grad[i, ~kept].any()


@each_backend("policy_loss")
def test_minus_infinity_logits_in_the_loss(backend: str) -> None:
    logits = BANNED.clone().requires_grad_()
    config = pf.PolicyLossConfig(ent_coef=0.1, kl_coef=0.1, kl_estimator="full")
    reference = torch.where(ALLOWED, 0.0, NINF)
    out = pf.policy_loss(
        logits, torch.tensor([2, 2]), None, torch.ones(2), None, config=config, ref_logits=reference, backend=backend
    )
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad.isfinite().all()
    assert not logits.grad[~ALLOWED].any()


@each_backend("token_stats")
def test_minus_infinity_at_the_target(backend: str) -> None:
    found = stats_and_gradients(BANNED[:1], torch.tensor([1]), backend)
    value, grad = found["logprobs"]
    assert value.item() == NINF
    p = torch.softmax(BANNED[:1], -1)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]) - p)
    assert found["entropy"][0].isfinite().all()
    assert found["entropy"][1].isfinite().all()


@each_backend("token_stats")
def test_a_row_of_minus_infinity_is_nan_and_stays_alone(backend: str) -> None:
    logits = torch.cat([torch.full((1, 5), NINF), BANNED]).requires_grad_()
    stats = pf.token_stats(logits, torch.tensor([0, 0, 2]), backend=backend)
    for x in stats[:2]:
        assert x.isnan().tolist() == [True, False, False]
    stats.logprobs.sum().backward()
    assert logits.grad.isfinite().all(1).tolist() == [False, True, True]


@each_backend("token_stats")
def test_a_word_the_reference_bans_makes_the_kl_infinite(backend: str) -> None:
    logits, targets = torch.zeros(2, 5), torch.tensor([0, 2])
    stats = pf.token_stats(logits, targets, ref_logits=torch.where(ALLOWED, 0.0, NINF), backend=backend)
    assert stats.kl.tolist() == [math.inf, math.inf]
    assert stats.entropy.isfinite().all()


@each_case("token_stats")
@pytest.mark.parametrize("V", [3, 257])
def test_rows_whose_logits_are_all_negative(backend: str, dtype: torch.dtype, V: int) -> None:
    logits = (-200 - 10 * torch.rand(2, V)).to(dtype)
    logprobs = pf.token_logprobs(logits, torch.tensor([0, V - 1]), backend=backend)
    expected = [oracles.log_softmax(row, 1.0)[t] for row, t in zip(logits.double().numpy(), (0, V - 1), strict=True)]
    assert_near_truth(logprobs, expected, dtype=dtype)


HUGE = 3e38  # the difference of two such overflows float32, and such a logit divided by a temperature below 1 too


@each_case("token_stats")
@pytest.mark.parametrize("V", [3, 300])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.5])
def test_logits_near_the_largest_float(backend: str, dtype: torch.dtype, V: int, temperature: float) -> None:
    """Finite wherever the truth is, infinite where float32 cannot hold it, never NaN; also through the linear ops."""
    huge = HUGE if dtype != torch.float16 else 6e4
    logits = torch.zeros(4, V, dtype=dtype)
    logits[:, :3] = torch.tensor([[0.5, -huge, 1.0], [-huge, huge, 0.0], [huge, -huge, 0.0], [-huge, 0.0, -huge]])
    logits[3, 3:] = -huge
    targets, reference = torch.tensor([1, 0, 1, 0]), torch.where(logits < -1, logits, 0.0)
    leaf, identity = logits.clone().requires_grad_(), torch.eye(V, dtype=dtype)
    direct = pf.token_stats(leaf, targets, ref_logits=reference, temperature=temperature, backend=backend)
    linear = pf.linear_token_stats(logits, identity, targets, temperature=temperature, backend=backend)
    (grad,) = torch.autograd.grad(direct.logprobs.sum(), leaf)
    rows = [oracles.log_softmax(row, temperature) for row in logits.double().numpy()]
    largest = torch.finfo(direct.logprobs.dtype).max
    logprobs = torch.tensor([u[target] for u, target in zip(rows, targets, strict=True)], dtype=torch.float64)
    logprobs = torch.where(logprobs < -largest, NINF, logprobs)
    for stats in (direct, linear):
        assert_near_truth(stats.logprobs, logprobs, dtype=dtype)
        assert_near_truth(stats.entropy, [oracles.entropy(u) for u in rows], dtype=dtype)
    references = [oracles.log_softmax(row, temperature) for row in reference.double().numpy()]
    assert_near_truth(direct.kl, [oracles.kl(u, w) for u, w in zip(rows, references, strict=True)], dtype=dtype)
    truth = [oracles.pull_back(u, None, int(t), temperature, 1.0, 0.0, 0.0) for u, t in zip(rows, targets, strict=True)]
    torch.testing.assert_close(grad.double(), torch.tensor(np.array(truth)), rtol=0.02, atol=1e-3)


@each_backend("policy_loss")
@pytest.mark.parametrize("term", ["penalty_coef", "ent_coef", "kl_coef"])
def test_every_term_has_its_gradient_at_the_right_temperature(backend: str, term: str) -> None:
    """Central differences of the float32 loss along the gradient."""
    case = make_case("padded")
    config = pf.PolicyLossConfig(clip_low=None, clip_high=None, temperature=0.7, **{term: 5.0})
    _, grad = run(case, config, backend)
    direction = grad / grad.norm()
    up, down = (run(case._replace(logits=case.logits + s * direction), config, backend)[0].loss for s in (5e-3, -5e-3))
    torch.testing.assert_close((up - down) / 1e-2, grad.norm(), rtol=1e-2, atol=0)


@each_case("token_stats", [torch.bfloat16, torch.float16])
def test_log_probabilities_of_halves_are_float32(backend: str, dtype: torch.dtype) -> None:
    logits = (4 * torch.randn(64, 33)).to(dtype)
    logprobs = pf.token_logprobs(logits, torch.randint(33, (64,)), backend=backend)
    assert logprobs.dtype == torch.float32
    assert not torch.equal(logprobs, logprobs.to(dtype).float())


@each_backend("token_stats")
def test_every_row_has_its_own_upstream_gradient(backend: str) -> None:
    logits, targets = torch.randn(4, 9, requires_grad=True), torch.randint(9, (4,))
    upstream = torch.tensor([0.0, 1.0, -2.0, 10.0])
    (grad,) = torch.autograd.grad(pf.token_logprobs(logits, targets, backend=backend), logits, upstream)
    rows = [torch.autograd.grad(pf.token_logprobs(logits, targets, backend=backend)[i], logits)[0][i] for i in range(4)]
    torch.testing.assert_close(grad, upstream[:, None] * torch.stack(rows))
    assert not grad[0].any()


@each_backend("policy_loss")
@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_nan_behind_the_mask_does_not_reach_the_gradient(backend: str, filler: float) -> None:
    case = make_case("padded")
    poisoned = case.logits.masked_fill(~case.mask[..., None], filler)
    out, grad = run(case._replace(logits=poisoned), pf.PolicyLossConfig(ent_coef=0.1), backend)
    clean, clean_grad = run(case, pf.PolicyLossConfig(ent_coef=0.1), backend)
    assert_same((out.loss, grad), (clean.loss, clean_grad))


@each_backend("policy_loss")
def test_the_gradient_does_not_overwrite_logits_unasked(backend: str) -> None:
    leaf = torch.randn(4, 4, 5, requires_grad=True)
    logits = leaf * 1.0
    before = logits.detach().clone()
    case = make_case("padded")
    pf.policy_loss(logits, *case[1:5], backend=backend).loss.backward()
    assert_same(logits.detach(), before)


@each_backend("policy_loss")
def test_a_mean_of_means_is_not_the_mean(backend: str) -> None:
    case = make_case("padded")
    config = pf.PolicyLossConfig()
    whole, _ = run(case, config, backend)
    halves = [type(case)(*(x[s] for x in case[:-1]), None) for s in (slice(0, 2), slice(2, 4))]
    means = [run(half, config, backend)[0].loss for half in halves]
    sums = [run(half, config, backend, denominator=case.mask.sum())[0].loss for half in halves]
    torch.testing.assert_close(sums[0] + sums[1], whole.loss)
    assert abs((means[0] + means[1]) / 2 - whole.loss) > 1e-3


@each_case("token_stats", [torch.bfloat16, torch.float16])
def test_the_target_column_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """p = 0.9996 at the target: rounding p before 1 - p would leave nothing of the gradient."""
    logits = torch.tensor([[9.0, 1.0, 0.5]]).to(dtype).requires_grad_()
    pf.token_logprobs(logits, torch.tensor([0]), backend=backend).backward(torch.ones(1))
    p = torch.softmax(logits.detach().double(), -1)
    expected = (torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64) - p).to(dtype)
    torch.testing.assert_close(logits.grad, expected, rtol=torch.finfo(dtype).eps, atol=0)


@each_backend("token_stats")
def test_offsets_beyond_int32(backend: str) -> None:
    """Two rows 2^31 elements apart; the pages between them are never touched."""
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    logits = torch.as_strided(storage, (2, 33), (2**31, 1))
    logits.copy_(torch.randn(2, 33))
    leaf = logits.detach().requires_grad_()
    near = logits.clone().requires_grad_()
    targets = torch.tensor([3, 32])
    for x in (leaf, near):
        pf.token_stats(x, targets, backend=backend).logprobs.sum().backward()
    assert_same(leaf.grad, near.grad)
    assert_same(pf.token_stats(leaf, targets, backend=backend), pf.token_stats(near, targets, backend=backend))


@each_case("token_stats")
@pytest.mark.parametrize("shift", [1, 3])
def test_misaligned_inputs(backend: str, dtype: torch.dtype, shift: int) -> None:
    targets = torch.randint(33, (5,))
    shifted_targets = torch.zeros(5 + shift, dtype=torch.long)[shift:].copy_(targets)
    logits = torch.randn(3 * 5 * 33).to(dtype)[: 5 * 33].view(5, 33)
    shifted = torch.zeros(5 * 33 + shift, dtype=dtype)[shift:].view(5, 33).copy_(logits)
    assert shifted.data_ptr() % 16 != logits.data_ptr() % 16
    plain = pf.token_stats(logits, targets, backend=backend)
    assert_same(pf.token_stats(logits, shifted_targets, backend=backend), plain)
    assert_same(pf.token_stats(shifted, targets, backend=backend), plain)


@each_case("gae", [torch.float32, torch.float64])
def test_a_long_scan_does_not_underflow(backend: str, dtype: torch.dtype) -> None:
    """gamma*lam = 1/4 over 2,000 steps: 0.25^2000 is 0 in float64, and a scan by division with it NaN."""
    T = 2000
    rewards, values = torch.ones(1, T, dtype=dtype), torch.zeros(1, T, dtype=dtype)
    advantages, _ = pf.gae(rewards, values, gamma=0.5, lam=0.5, backend=backend)
    left = T - torch.arange(T, dtype=torch.float64)
    assert_near_truth(advantages, (1 - 0.25**left) / 0.75, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.op])
def test_no_host_sync(name: str) -> None:
    inputs = {k: v.detach().cuda() for k, v in fresh_inputs(name).items()}
    if leaf := EXAMPLES[name].leaf:
        inputs[leaf].requires_grad_()
    if name.startswith("linear"):
        inputs["mask"] = None  # with a mask they read the number of rows that count
    run_with_gradient(name, "auto", inputs)
    with no_host_sync():
        run_with_gradient(name, "auto", inputs)
