"""policy_loss(inplace=True): the same numbers, the gradient in the storage of the logits, and every refusal."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests.helpers import assert_same, each_backend, each_case, raises_exactly
from tests.ops.policy_cases import Case, make_case, references

CONFIGS = {
    "k3": pf.PolicyLossConfig(ent_coef=0.1, kl_coef=0.1),
    "cispo": pf.PolicyLossConfig(objective="cispo", penalty_coef=0.1),
    "full": pf.PolicyLossConfig(kl_coef=0.1, kl_estimator="full", ratio="sequence"),
}


def loss_of(logits: Tensor, case: Case, config: pf.PolicyLossConfig, backend: str, inplace: bool) -> pf.LossOutput:
    """The loss of these logits with the rest of the case."""
    return pf.policy_loss(
        logits, *case[1:5], **references(case, config), config=config, backend=backend, inplace=inplace
    )


@each_case("policy_loss")
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_the_plain_call(backend: str, dtype: torch.dtype, kind: str) -> None:
    case, results = make_case("padded", dtype), []
    for inplace in (False, True):
        leaf = case.logits.clone().requires_grad_()
        out = loss_of(leaf * 1.5, case, CONFIGS[kind], backend, inplace)
        out.loss.backward()
        results.append((out.loss, out.metrics, tuple(out.per_token), leaf.grad))
    assert_same(*results)


@each_backend("policy_loss")
def test_the_storage_of_the_logits_becomes_the_gradient(backend: str) -> None:
    case = make_case("padded")
    leaf = case.logits.clone().requires_grad_()
    logits = leaf * 1.5
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    loss_of(logits, case, CONFIGS["k3"], backend, inplace=True).loss.backward()
    assert seen[0].data_ptr() == logits.data_ptr()
    assert_same(seen[0], logits.detach())
    assert not logits[~case.mask].any()


@each_backend("policy_loss")
def test_a_slice_is_written_in_place_and_nothing_beside_it(backend: str) -> None:
    case = make_case("padded")
    leaf = torch.randn(4, 7, 5, requires_grad=True)
    full = leaf * 1.5
    before = full.detach().clone()
    loss_of(full[:, 2:-1], case, CONFIGS["k3"], backend, inplace=True).loss.backward()
    plain_leaf = leaf.detach().clone().requires_grad_()
    loss_of((plain_leaf * 1.5)[:, 2:-1], case, CONFIGS["k3"], backend, inplace=False).loss.backward()
    assert_same(leaf.grad, plain_leaf.grad)
    assert_same(full[:, :2], before[:, :2])
    assert_same(full[:, -1], before[:, -1])
    assert_same(full[:, 2:-1] * 1.5, plain_leaf.grad[:, 2:-1])


@each_backend("policy_loss")
def test_a_leaf_that_requires_grad_is_refused(backend: str) -> None:
    case = make_case("padded")
    with raises_exactly(
        "policy_loss: expected logits that are no leaf with inplace=True, got a leaf that requires grad"
    ):
        loss_of(case.logits.requires_grad_(), case, CONFIGS["k3"], backend, inplace=True)


@each_backend("policy_loss")
def test_overlapping_memory_is_refused(backend: str) -> None:
    case = make_case("padded")
    one_row = torch.randn(1, 1, 5, requires_grad=True) * 1.5
    with raises_exactly(
        "policy_loss: expected logits without overlapping memory with inplace=True, "
        "got shape [4, 4, 5] with strides [0, 0, 1]"
    ):
        loss_of(one_row.expand(4, 4, 5), case, CONFIGS["k3"], backend, inplace=True)


@each_backend("policy_loss")
@pytest.mark.parametrize("retain_graph", [False, True])
def test_a_second_backward_is_refused(backend: str, retain_graph: bool) -> None:
    case = make_case("padded")
    loss = loss_of(case.logits.requires_grad_() * 1.5, case, CONFIGS["k3"], backend, inplace=True).loss
    loss.backward(retain_graph=retain_graph)
    with raises_exactly("policy_loss: expected one backward with inplace=True, got a second one", RuntimeError):
        loss.backward()


@each_backend("policy_loss")
def test_refused_under_compile(backend: str) -> None:
    case = make_case("padded")

    def loss(leaf: Tensor) -> Tensor:
        return loss_of(leaf * 1.5, case, CONFIGS["k3"], backend, inplace=True).loss

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"expected inplace=False under torch.compile, got inplace=True"):
        torch.compile(loss, fullgraph=True, backend="eager")(case.logits.requires_grad_())


@each_backend("policy_loss")
@pytest.mark.parametrize("moment", ["after the forward", "after the backward"])
def test_others_who_saved_the_logits_are_told(backend: str, moment: str) -> None:
    case = make_case("padded")
    logits = case.logits.requires_grad_() * 1.5
    version = logits._version
    theirs = logits.square().sum()
    loss = loss_of(logits, case, CONFIGS["k3"], backend, inplace=True).loss
    assert logits._version > version
    if moment == "after the backward":
        version = logits._version
        loss.backward(retain_graph=True)
        assert logits._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        theirs.backward()


@each_backend("policy_loss")
@pytest.mark.parametrize("why", ["no_grad", "inference_mode", "needs no gradient"])
def test_no_effect_without_a_gradient(backend: str, why: str) -> None:
    case = make_case("padded")
    logits = case.logits if why == "needs no gradient" else case.logits.requires_grad_()
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(why, torch.enable_grad)
    before, version = logits.detach().clone(), logits._version
    with context():
        out = loss_of(logits, case, CONFIGS["k3"], backend, inplace=True)
    assert_same(out.loss, loss_of(before, case, CONFIGS["k3"], backend, inplace=False).loss)
    assert_same(logits.detach(), before)
    assert logits._version == version


class _Identity(torch.autograd.Function):
    """A layer of somebody's own that returns a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@each_backend("policy_loss")
def test_a_view_made_by_a_custom_function(backend: str) -> None:
    case, gradients = make_case("padded"), []
    for inplace in (False, True):
        leaf = case.logits.clone().requires_grad_()
        loss_of(_Identity.apply(leaf * 1.5), case, CONFIGS["k3"], backend, inplace).loss.backward()
        gradients.append(leaf.grad)
    assert_same(*gradients)
