"""preference_loss and dpo_loss: values, gradients and metrics against float64."""

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests import oracles
from tests.helpers import DTYPES, assert_near_truth, assert_same

B = 7
NAMES = ("logprobs_chosen", "logprobs_rejected", "ref_chosen", "ref_rejected")


def make(dtype: torch.dtype, *names: str, scale: float = 2.0) -> dict[str, Tensor]:
    return {name: (scale * torch.randn(B)).to(dtype) for name in names}


def eager(wanted: Tensor) -> Tensor:
    """The loss in plain float32."""
    return torch.nn.functional.softplus(-wanted).mean()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_margin", [False, True])
def test_preference_loss_against_float64(dtype: torch.dtype, with_margin: bool) -> None:
    scores = make(dtype, "chosen_scores", "rejected_scores")
    margin = torch.rand(B).to(dtype) if with_margin else None
    truth = oracles.preference_loss(
        *(x.double().numpy() for x in scores.values()), None if margin is None else margin.double().numpy()
    )
    leaves = {name: x.requires_grad_() for name, x in scores.items()}
    out = pf.preference_loss(**leaves, margin=margin)
    out.loss.backward()
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near_truth(out.loss, truth.loss, dtype=dtype)
    slopes = torch.tensor(truth.grad).to(dtype)
    assert_near_truth(leaves["chosen_scores"].grad, slopes, dtype=dtype, gradient=True)
    assert_near_truth(leaves["rejected_scores"].grad, -slopes, dtype=dtype, gradient=True)
    assert out.metrics.keys() == {"accuracy", "margin"}
    for name, value in out.metrics.items():
        assert_near_truth(value, truth.metrics[name], dtype=dtype)
    assert 0 < out.metrics["accuracy"] < 1
    assert out.per_token is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.1, 2])
def test_dpo_loss_against_float64(dtype: torch.dtype, beta: float) -> None:
    inputs = make(dtype, *NAMES, scale=5)
    truth = oracles.dpo_loss(*(x.double().numpy() for x in inputs.values()), beta)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out = pf.dpo_loss(**leaves, beta=beta)
    out.loss.backward()
    gap = (leaves["logprobs_chosen"].float() - leaves["ref_chosen"].float()) - (
        leaves["logprobs_rejected"].float() - leaves["ref_rejected"].float()
    )
    assert_near_truth(out.loss, truth.loss, eager(beta * gap) if dtype != torch.float64 else None, dtype=dtype)
    slopes = torch.tensor(truth.grad).to(dtype)
    assert_near_truth(leaves["logprobs_chosen"].grad, slopes, dtype=dtype, gradient=True)
    assert_near_truth(leaves["logprobs_rejected"].grad, -slopes, dtype=dtype, gradient=True)
    assert out.metrics.keys() == {"accuracy", "margin", "reward_chosen", "reward_rejected"}
    for name, value in out.metrics.items():
        assert_near_truth(value, truth.metrics[name], dtype=dtype)
    assert 0 < out.metrics["accuracy"] < 1
    assert out.per_token is None


def test_the_reference_and_the_margin_get_no_gradient() -> None:
    inputs = {name: x.requires_grad_() for name, x in make(torch.float32, *NAMES, "margin").items()}
    margin = inputs.pop("margin")
    pf.dpo_loss(**inputs).loss.backward()
    assert inputs["ref_chosen"].grad is inputs["ref_rejected"].grad is None
    pf.preference_loss(inputs["logprobs_chosen"], inputs["logprobs_rejected"], margin=margin).loss.backward()
    assert margin.grad is None


def test_dpo_against_a_flat_reference_is_the_preference_loss_of_the_rewards() -> None:
    chosen, rejected = torch.randn(2, B, dtype=torch.float64)
    zero = torch.zeros(B, dtype=torch.float64)
    ours = pf.dpo_loss(chosen, rejected, zero, zero, beta=0.5)
    theirs = pf.preference_loss(0.5 * chosen, 0.5 * rejected)
    assert_same(ours.loss, theirs.loss)
    assert_same((ours.metrics["accuracy"], ours.metrics["margin"]), tuple(theirs.metrics.values()))


def test_equal_pairs_lose_log_2_and_are_not_counted_as_right() -> None:
    x = torch.randn(B, dtype=torch.float64)
    for out in (pf.preference_loss(x, x), pf.dpo_loss(x, x, x, x)):
        assert out.loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-7)
        assert (out.metrics["accuracy"], out.metrics["margin"]) == (0, 0)


def test_large_gaps_neither_overflow_nor_vanish() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    out = pf.preference_loss(chosen, torch.zeros(2))
    out.loss.backward()
    assert out.loss == 5e3
    assert chosen.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3)])
def test_free_shapes(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(2, *shape)
    out = pf.preference_loss(x, y)
    torch.testing.assert_close(out.loss, eager(x - y) if x.numel() else torch.tensor(0.0))
    assert_same(pf.dpo_loss(x, y, x, x).metrics["reward_chosen"], torch.tensor(0.0))


def test_one_float64_argument_makes_everything_float64() -> None:
    single, double = torch.randn(B), torch.randn(B, dtype=torch.float64)
    assert pf.preference_loss(single, double).loss.dtype == torch.float64
    assert pf.dpo_loss(single, single, single, double).loss.dtype == torch.float64


def test_gradcheck() -> None:
    chosen, rejected = (torch.randn(B, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ref = torch.randn(2, B, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, y: pf.preference_loss(x, y, margin=ref[0]).loss, (chosen, rejected))
    assert torch.autograd.gradcheck(lambda x, y: pf.dpo_loss(x, y, *ref, beta=0.7).loss, (chosen, rejected))
