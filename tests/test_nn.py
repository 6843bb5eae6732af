"""The modules of ppo_fast.nn are the ops, with their options fixed."""

import inspect
from typing import Any

import pytest
import torch

import ppo_fast
from ppo_fast import nn
from tests.helpers import assert_same, raises_exactly

B, T, V, D = 2, 5, 7, 3
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
CONFIG = ppo_fast.PolicyLossConfig(clip_high=0.3, kl_coef=0.1, ent_coef=0.01, aggregation="seq-mean-token-mean")


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TARGETS = torch.arange(B * T).view(B, T) % V
POLICY = (TARGETS, -rows(1, B, T).abs(), rows(2, B, T), MASK)
REFERENCE = {"ref_logprobs": -rows(3, B, T).abs(), "denominator": 4}


@pytest.mark.parametrize("config", [CONFIG, {**CONFIG.__dict__}], ids=["object", "mapping"])
def test_policy_loss(config: Any) -> None:
    ours = nn.PolicyLoss(config, backend="torch")(rows(0, B, T, V), *POLICY, **REFERENCE)
    assert_same(ours, ppo_fast.policy_loss(rows(0, B, T, V), *POLICY, config=CONFIG, backend="torch", **REFERENCE))


def test_policy_loss_in_place() -> None:
    logits = rows(0, B, T, V).requires_grad_()
    copy = logits * 1
    nn.PolicyLoss(CONFIG, inplace=True)(copy, *POLICY, **REFERENCE).loss.backward()
    assert copy._version > 0
    again = rows(0, B, T, V).requires_grad_()
    ppo_fast.policy_loss(again, *POLICY, config=CONFIG, **REFERENCE).loss.backward()
    torch.testing.assert_close(logits.grad, again.grad)


def test_linear_policy_loss() -> None:
    options = {"softcap": 2.0, "chunk_size": 3, "backend": "torch"}
    inputs = (rows(4, B, T, D), rows(5, V, D), *POLICY)
    ours = nn.LinearPolicyLoss(CONFIG, **options)(*inputs, bias=rows(6, V), **REFERENCE)
    assert_same(ours, ppo_fast.linear_policy_loss(*inputs, config=CONFIG, bias=rows(6, V), **options, **REFERENCE))


def test_value_loss() -> None:
    options = {"clip": 0.1, "aggregation": "seq-mean-token-sum", "backend": "torch"}
    inputs = (rows(1, B, T), rows(2, B, T), MASK)
    ours = nn.ValueLoss(**options)(*inputs, old_values=rows(3, B, T))
    assert_same(ours, ppo_fast.value_loss(*inputs, old_values=rows(3, B, T), **options))


def test_options_are_checked_and_shown() -> None:
    with raises_exactly("PolicyLossConfig: expected clip_low to be a number in [0, 1], got -1"):
        nn.PolicyLoss({"clip_low": -1})
    assert "clip_high=0.3" in repr(nn.PolicyLoss(CONFIG))
    assert repr(nn.ValueLoss(0.2)) == "ValueLoss(clip=0.2, aggregation='token-mean', backend='auto')"


@pytest.mark.parametrize("name", ["policy_loss", "linear_policy_loss", "value_loss"])
def test_every_argument_of_the_op_has_a_place(name: str) -> None:
    module = getattr(nn, "".join(part.capitalize() for part in name.split("_")))
    wanted = set(inspect.signature(getattr(ppo_fast, name)).parameters)
    fixed = set(inspect.signature(module.__init__).parameters)
    called = set(inspect.signature(module.forward).parameters)
    named = {word.strip(".,;`") for word in module.forward.__doc__.split()}
    assert wanted <= fixed | called | named
