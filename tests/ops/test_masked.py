"""masked_mean, whiten and kl_estimate: values and gradients against float64."""

import pytest
import torch

import ppo_fast as pf
from tests import oracles
from tests.helpers import DTYPES, assert_near_truth

MASK = torch.tensor([[1, 0, 1], [0, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_mean(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3).to(dtype).requires_grad_()
    mean = pf.masked_mean(x, MASK)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near_truth(mean, x.detach().double()[MASK].mean(), dtype=dtype)
    mean.backward()
    assert_near_truth(x.grad, (MASK / 4).to(dtype).double(), dtype=dtype, gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(dtype: torch.dtype, shift_mean: bool) -> None:
    x = (torch.randn(2, 3) + 5).to(dtype)
    expected = oracles.whiten(x.double().numpy(), MASK.numpy(), shift_mean)
    white = pf.whiten(x, MASK, shift_mean=shift_mean)
    assert white.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eager = (x.float()[MASK] - x.float()[MASK].mean()) * torch.rsqrt(x.float()[MASK].var() + 1e-8)
    eager = eager if shift_mean else eager + x.float()[MASK].mean()
    assert_near_truth(white[MASK], expected[MASK.numpy()], eager if dtype != torch.float64 else None, dtype=dtype)
    assert not white[~MASK].any()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_one_element(shift_mean: bool) -> None:
    x, one = torch.tensor([3.0, 7.0]), torch.tensor([False, True])
    assert pf.whiten(x, one, shift_mean=shift_mean).tolist() == [0.0, 0.0 if shift_mean else 7.0]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,)])
def test_shapes_without_a_mask(shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 2.0)
    assert pf.masked_mean(x, None) == (2.0 if x.numel() else 0.0)
    assert torch.equal(pf.whiten(x, None), torch.zeros(shape))
    assert pf.kl_estimate(x, x).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimate(dtype: torch.dtype, estimator: str) -> None:
    logprobs, ref = torch.tensor([-1.0, -30.0, -2.0, -0.5]), torch.tensor([-1.0, -2.0, -30.0, -0.25])
    x, y = logprobs.to(dtype).requires_grad_(), ref.to(dtype).requires_grad_()
    expected = [oracles.kl_term(a, b, estimator) for a, b in zip(logprobs.tolist(), ref.tolist(), strict=True)]
    estimate = pf.kl_estimate(x, y, estimator)
    assert estimate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near_truth(estimate, [value for value, _ in expected], dtype=dtype)
    estimate.sum().backward()
    slopes = torch.tensor([slope for _, slope in expected], dtype=torch.float64).to(dtype)
    assert_near_truth(x.grad, slopes, dtype=dtype, gradient=True)
    assert_near_truth(y.grad, -slopes, dtype=dtype, gradient=True)


def test_gradcheck() -> None:
    x, y = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: pf.masked_mean(x, MASK), x)
    for shift_mean in (True, False):
        assert torch.autograd.gradcheck(lambda x, s=shift_mean: pf.whiten(x, MASK, shift_mean=s), x)
    for estimator in ("k1", "k2", "k3"):
        assert torch.autograd.gradcheck(lambda x, y, e=estimator: pf.kl_estimate(x, y, e), (x, y))
