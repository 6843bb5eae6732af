"""One small call of each op: nothing for the device to do, so that a call takes what the host takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from benchmarks import harness
from tests import eager

ROWS, V, D = 4, 256, 64
CONFIG = ppo_fast.PolicyLossConfig(ent_coef=0.01, kl_coef=0.05, kl_estimator="k2")


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=harness.DEVICE)


def _backward(loss: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    leaf = like.detach().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


class Inputs:
    """Inputs of every op: ROWS tokens, or as many sequences of one step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.logits, self.hidden, self.weight = _randn(ROWS, V), _randn(ROWS, D), _randn(V, D)
        self.targets = torch.randint(0, V, (ROWS,), device=harness.DEVICE)
        self.old, self.advantages, self.ref = _randn(3, ROWS).sub(5.0).unbind()
        self.mask = torch.ones(ROWS, dtype=torch.bool, device=harness.DEVICE)

    def loss(self, logits: Tensor, of: Callable[..., Any] = ppo_fast.policy_loss) -> Any:
        """The policy loss by the function ``of``."""
        rows = (self.targets, self.old, self.advantages, self.mask)
        return of(logits, *rows, config=CONFIG, ref_logprobs=self.ref)

    def linear_loss(self, hidden: Tensor) -> Tensor:
        """The policy loss of a frozen head."""

        def head(x: Tensor, *rows: Tensor, **options: Any) -> Any:
            return ppo_fast.linear_policy_loss(x, self.weight, *rows, **options)

        return self.loss(hidden, head).loss

    def value_loss(self, values: Tensor, of: Callable[..., Any] = ppo_fast.value_loss) -> Any:
        """The clipped value loss by the function ``of``."""
        return of(values, self.advantages, self.mask, old_values=self.old, clip=0.2)


# Each call, and the same by torch.
CALLS: dict[str, tuple[Callable[[Inputs], Any], Callable[[Inputs], Any] | None]] = {
    "token_stats": (
        lambda x: ppo_fast.token_stats(x.logits, x.targets).entropy,
        lambda x: eager.token_stats(x.logits, x.targets)[1],
    ),
    "policy_loss, forward+backward": (
        lambda x: _backward(lambda logits: x.loss(logits).loss, x.logits),
        lambda x: _backward(lambda logits: x.loss(logits, eager.policy_loss), x.logits),
    ),
    "linear_policy_loss, forward+backward": (lambda x: _backward(x.linear_loss, x.hidden), None),
    "value_loss, forward+backward": (
        lambda x: _backward(lambda values: x.value_loss(values).loss, x.old),
        lambda x: _backward(lambda values: x.value_loss(values, eager.value_loss), x.old),
    ),
    "gae": (lambda x: ppo_fast.gae(x.ref[:, None], x.old[:, None]), None),
}


@pytest.mark.parametrize("call", CALLS)
def test_call(benchmark: Any, call: str) -> None:
    benchmark.group = f"{call}, {ROWS} rows"
    inputs = Inputs()
    ours, theirs = CALLS[call]
    ratios = {}
    if theirs is not None:
        torch.testing.assert_close(ours(inputs), theirs(inputs), rtol=1e-4, atol=1e-6)
        ratios["eager"] = harness.paired_ratio(lambda: ours(inputs), lambda: theirs(inputs), rounds=100)
    benchmark.extra_info |= {
        "contender": "auto",
        "peak_bytes": harness.peak_bytes(lambda: ours(inputs)),
        "ratios": ratios,
    }
    benchmark.pedantic(lambda: ours(inputs), rounds=100, iterations=10, warmup_rounds=5)
