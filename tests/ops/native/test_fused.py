"""The policy loss whose backend writes the gradient in the forward pass: what autograd sees of it."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_fast as pf
from ppo_fast.ops._core import registry
from tests.helpers import assert_same, raises_exactly
from tests.ops.native.isas import each_dtype, logits_of

ROWS, VOCAB = 40, 700
RATIOS = pytest.mark.parametrize("ratio", ["token", "sequence"])


GENERATOR = torch.Generator().manual_seed(3)
OLD, ADVANTAGES = torch.randn(2, 2, ROWS // 2, generator=GENERATOR)
TARGETS = torch.randint(VOCAB, OLD.shape, generator=GENERATOR)
MASK = torch.rand(OLD.shape, generator=GENERATOR) < 0.8


def loss_of(logits: Tensor, *, ratio: str = "token", inplace: bool = False) -> Tensor:
    """A policy loss of [2, ROWS / 2, VOCAB] logits."""
    config = pf.PolicyLossConfig(ent_coef=0.1, penalty_coef=0.1, ratio=ratio)
    return pf.policy_loss(
        logits, TARGETS, OLD - 7, ADVANTAGES, MASK, config=config, inplace=inplace, backend="native"
    ).loss


def leaf_of(dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits that ask for a gradient."""
    torch.manual_seed(5)
    return logits_of(ROWS, VOCAB, dtype).view(2, -1, VOCAB).requires_grad_()


class CountedOps(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The native launchers that ran, and whether they were given a gradient to write."""
    seen: list[str] = []
    for op in ("policy_loss", "token_stats", "token_stats_backward"):
        entry = registry._TABLE[op]["native"]

        def run(*args: Any, _op: str = op, _run: Any = entry.run, **kwargs: Any) -> Any:
            seen.append(_op + (" with gradient" if "out" in kwargs and _op == "policy_loss" else ""))
            return _run(*args, **kwargs)

        monkeypatch.setitem(registry._TABLE[op], "native", entry._replace(run=run))
    return seen


@RATIOS
def test_one_launch_gives_loss_and_gradient(launches: list[str], ratio: str) -> None:
    loss_of(leaf_of(), ratio=ratio).backward()
    assert launches == ["policy_loss with gradient"]


@pytest.mark.parametrize("why", ["no_grad", "no gradient asked for"])
def test_no_gradient_is_written_that_nobody_asks_for(launches: list[str], why: str) -> None:
    logits = leaf_of() if why == "no_grad" else leaf_of().detach()
    with torch.set_grad_enabled(why != "no_grad"):
        loss_of(logits)
    assert launches == ["policy_loss"]


@RATIOS
@each_dtype
def test_a_second_backward_gives_the_same_bits_in_another_storage(ratio: str, dtype: torch.dtype) -> None:
    leaf = leaf_of(dtype)
    loss = loss_of(leaf, ratio=ratio)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    kept = first.clone()
    first.zero_()
    second, third = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert_same((second, third), (kept, kept))
    assert len({x.data_ptr() for x in (first, second, third)}) == 3


@each_dtype
def test_gradients_accumulate(dtype: torch.dtype) -> None:
    leaf = leaf_of(dtype)
    loss = loss_of(leaf)
    once = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert_same(leaf.grad, once + once + once)


@RATIOS
@pytest.mark.parametrize("scale", [-4.0, 0.3])
def test_the_gradient_of_a_scaled_loss_is_rounded_once(ratio: str, scale: float) -> None:
    half = leaf_of(torch.bfloat16)
    exact = half.detach().float().requires_grad_()
    for leaf in (half, exact):
        (scale * loss_of(leaf, ratio=ratio)).backward()
    assert_same(half.grad, exact.grad.bfloat16())


@RATIOS
@each_dtype
def test_inplace_gives_the_same_bits(ratio: str, dtype: torch.dtype) -> None:
    results = []
    for inplace in (False, True):
        leaf = leaf_of(dtype)
        loss = loss_of(leaf * 1.0, ratio=ratio, inplace=inplace)
        (4 * loss).backward()
        results.append((loss, leaf.grad))
    assert_same(*results)


def test_inplace_scales_what_it_has_written(launches: list[str]) -> None:
    leaf = leaf_of()
    logits = leaf * 1.0
    plain = torch.autograd.grad(loss_of(leaf), leaf)[0]
    launches.clear()
    (0.3 * loss_of(logits, inplace=True)).backward()
    assert launches == ["policy_loss with gradient"]
    assert_same(leaf.grad, plain * 0.3)


def test_logits_changed_after_the_loss_are_noticed_where_they_are_read_again() -> None:
    logits = leaf_of() * 1.0
    loss = loss_of(logits)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * loss).backward()


def test_a_compiled_loss_runs_the_registered_ops(launches: list[str]) -> None:
    eager, leaf = leaf_of(), leaf_of()
    loss_of(eager).backward()
    launches.clear()
    torch._dynamo.reset()
    torch.compile(loss_of, fullgraph=True, backend="aot_eager")(leaf).backward()
    assert launches == ["policy_loss", "token_stats_backward"]
    assert_same(leaf.grad, eager.grad)


def test_a_loss_whose_backward_pass_is_traced_runs_the_registered_op_there() -> None:
    """Statistics that the eager loss leaves out are empty tensors for the op."""
    plain, traced = leaf_of(), leaf_of()
    (0.3 * loss_of(plain)).backward()
    loss = 0.3 * loss_of(traced)
    with CountedOps() as ops:
        loss.backward()
    assert "token_stats_backward" in ops.names
    assert_same(traced.grad, plain.grad)


@RATIOS
def test_a_target_outside_the_vocabulary_is_refused_before_the_logits_are_overwritten(
    ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets = leaf_of() * 1.0, TARGETS.clone()
    targets[MASK.nonzero()[-1].unbind()] = VOCAB
    monkeypatch.setitem(globals(), "TARGETS", targets)
    before = logits.detach().clone()
    message = f"policy_loss: expected targets in [0, {VOCAB}) where mask is True, got {VOCAB}"
    for inplace in (True, False):
        with raises_exactly(message):
            loss_of(logits, ratio=ratio, inplace=inplace)
    assert_same(logits, before)


def test_few_operations_of_torch_surround_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes about as long as the kernel does on a row."""
    monkeypatch.setattr(registry, "runs_directly", lambda x: True)  # the mode that counts would be seen as a tracer
    leaf, old = leaf_of(), OLD - 7
    with CountedOps() as ops:
        pf.policy_loss(leaf, TARGETS, old, ADVANTAGES, MASK, backend="native").loss.backward()
    results = {"empty_like": 5, "new_empty": 2, "unbind": 1}  # the last takes the metrics apart
    gradient = {"ones_like": 1, "_local_scalar_dense": 1, "detach": 2}  # of the loss: made, read, handed on
    assert Counter(ops.names) == results | gradient
