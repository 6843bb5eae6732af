"""Views: what is read in place, what costs one copy, and that no layout changes a bit of the result."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.ops._core import registry
from tests.helpers import assert_same, each_backend
from tests.ops.examples import EXAMPLES, each_example, fresh_inputs, run_with_gradient


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The arguments with which each registered op last reached its launcher."""
    seen: dict[str, tuple[Any, ...]] = {}

    def recorded(op: str, entry: registry.Implementation) -> registry.Implementation:
        def launch(*args: Any, **keywords: Any) -> Any:
            seen[op] = args
            return entry.run(*args, **keywords)

        return entry._replace(run=launch)

    for op, entries in registry._TABLE.items():
        for backend, entry in entries.items():
            monkeypatch.setitem(entries, backend, recorded(op, entry))
    return seen


def occupies(got: Tensor, view: Tensor) -> bool:
    """Whether ``got`` is read from the memory of ``view``, element for element."""
    return got.data_ptr() == view.data_ptr() and got.stride() == view.stride() and got.shape == view.shape


LOGITS_VIEWS = {
    "response slice": lambda: torch.randn(3, 9, 11)[:, 3:-1],
    "time-major": lambda: torch.randn(5, 3, 11).transpose(0, 1),
    "sliced vocabulary": lambda: torch.randn(3, 5, 16)[..., :11],
    "broadcast rows": lambda: torch.randn(1, 1, 11).expand(3, 5, 11),
    "every other row": lambda: torch.randn(3, 10, 11)[:, ::2],
}


@pytest.mark.parametrize("view", LOGITS_VIEWS)
@each_backend("token_stats")
def test_logits_views_are_read_in_place(backend: str, view: str, received: dict[str, tuple[Any, ...]]) -> None:
    logits, targets = LOGITS_VIEWS[view](), torch.randint(11, (3, 5))
    stats = pf.token_stats(logits, targets, backend=backend)
    assert occupies(received["token_stats"][0].logits, logits)
    assert_same(stats, pf.token_stats(logits.clone(memory_format=torch.contiguous_format), targets, backend=backend))
    pf.policy_loss(logits, targets, None, torch.ones(3, 5), None, backend=backend)
    assert occupies(received["policy_loss"][0].logits, logits)


@each_backend("token_stats")
def test_a_packed_slice_is_read_in_place(backend: str, received: dict[str, tuple[Any, ...]]) -> None:
    logits = torch.randn(9, 16)[2:7, :11]
    pf.token_logprobs(logits, torch.zeros(5, dtype=torch.long), backend=backend)
    assert occupies(received["token_stats"][0].logits[0], logits)


@pytest.mark.parametrize("view", LOGITS_VIEWS)
@each_backend("token_stats")
def test_gradients_reach_the_base_of_a_view(backend: str, view: str) -> None:
    targets, upstream = torch.randint(11, (3, 5)), torch.randn(3, 5)
    logits = LOGITS_VIEWS[view]()
    leaf = logits._base.clone().requires_grad_()
    seen = torch.as_strided(leaf, logits.shape, logits.stride(), logits.storage_offset())
    pf.token_logprobs(seen, targets, backend=backend).backward(upstream)
    plain = logits.clone(memory_format=torch.contiguous_format).requires_grad_()
    pf.token_logprobs(plain, targets, backend=backend).backward(upstream)
    expected = torch.zeros_like(leaf)
    index = torch.arange(leaf.numel()).view_as(leaf)
    places = torch.as_strided(index, logits.shape, logits.stride(), logits.storage_offset())
    expected.view(-1).index_add_(0, places.flatten(), plain.grad.flatten())
    torch.testing.assert_close(leaf.grad, expected)


@each_backend("token_stats")
def test_a_transposed_vocabulary_costs_one_copy(backend: str, received: dict[str, tuple[Any, ...]]) -> None:
    logits, targets = torch.randn(3, 11, 5).transpose(1, 2), torch.randint(11, (3, 5))
    stats = pf.token_stats(logits, targets, backend=backend)
    assert received["token_stats"][0].logits.stride(-1) == 1
    assert_same(stats, pf.token_stats(logits.contiguous(), targets, backend=backend))


@each_backend("gae")
def test_time_major_rewards_are_read_in_place(backend: str, received: dict[str, tuple[Any, ...]]) -> None:
    rewards, values, dones = torch.randn(7, 3), torch.randn(7, 3), torch.rand(7, 3) < 0.2
    results = pf.gae(rewards.T, values.T, dones=dones.T, backend=backend)
    (got,) = received["gae"]
    assert occupies(got.rewards, rewards.T)
    assert occupies(got.values, values.T)
    assert occupies(got.dones, dones.T)
    contiguous = (x.T.contiguous() for x in (rewards, values))
    assert_same(results, pf.gae(*contiguous, dones=dones.T.contiguous(), backend=backend))
    assert all(x.is_contiguous() for x in results)


def _time_major(x: Tensor) -> Tensor:
    """The same tensor with its first two dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def _gapped(x: Tensor) -> Tensor:
    """The same tensor with a gap after each element of its first dimension."""
    holder = torch.zeros(2 * x.shape[0], *x.shape[1:], dtype=x.dtype)
    holder[::2] = x
    return holder[::2]


@pytest.mark.parametrize("arrange", [_time_major, _gapped])
@each_example()
def test_no_input_layout_changes_the_result(name: str, backend: str, arrange: Any) -> None:
    inputs = {k: arrange(v) for k, v in EXAMPLES[name].inputs.items()}
    if leaf := EXAMPLES[name].leaf:
        inputs[leaf] = inputs[leaf].detach().requires_grad_()
    results, expected = (run_with_gradient(name, backend, i) for i in (inputs, fresh_inputs(name)))
    # torch.sum adds in the order of memory and a matrix product in one of its own: what has them agrees to rounding.
    if EXAMPLES[name].op and not name.startswith("linear"):
        assert_same(results, expected)
    else:
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)


def test_the_interpreter_flag_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    assert registry.interpreting()
    monkeypatch.delitem(os.environ, "TRITON_INTERPRET")
    assert not registry.interpreting()
