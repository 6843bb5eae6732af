"""token_logprobs, token_stats and entropy: values and gradients against float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests import eager, oracles
from tests.helpers import assert_near_truth, assert_same, each_backend, each_case, raises_exactly

# V = 1, below and above a vector, not a multiple of any block.
VOCABULARIES = (1, 2, 33, 257, 1037)


def make(shape: tuple[int, ...], V: int, dtype: torch.dtype, *, offset: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, reference logits, targets)."""
    logits = (3 * torch.randn(*shape, V) + offset).to(dtype)
    reference = (logits.float() + 0.5 * torch.randn(*shape, V)).to(dtype)
    return logits, reference, torch.randint(V, shape)


def truth(
    logits: Tensor, reference: Tensor, targets: Tensor, temperature: float, upstream: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """(statistics [3, N], gradient [N, V]) of the rows, for upstream gradients [3, N]."""
    z, q = (x.double().reshape(-1, x.shape[-1]).numpy() for x in (logits, reference))
    stats, grads = [], []
    for row, ref, target, (g, g_entropy, g_kl) in zip(
        z, q, targets.flatten().tolist(), upstream.T.tolist(), strict=True
    ):
        u, w = oracles.log_softmax(row, temperature), oracles.log_softmax(ref, temperature)
        stats.append([u[target], oracles.entropy(u), oracles.kl(u, w)])
        grads.append(oracles.pull_back(u, w, target, temperature, g, g_entropy, g_kl))
    return np.array(stats).T, np.array(grads)


def check(logits: Tensor, reference: Tensor, targets: Tensor, temperature: float, backend: str) -> None:
    """All three statistics and their common gradient obey the tolerance rule, with every row weighted differently."""
    upstream = torch.randn(3, targets.numel(), dtype=torch.float64)
    ours_leaf, eager_leaf = (logits.detach().requires_grad_() for _ in range(2))
    ours = pf.token_stats(ours_leaf, targets, ref_logits=reference, temperature=temperature, backend=backend)
    theirs = eager.token_stats(eager_leaf, targets, reference, temperature)
    expected, grad = truth(logits, reference, targets, temperature, upstream)
    for a, b, c in zip(ours, theirs, expected, strict=True):
        assert_near_truth(a, c, b, dtype=logits.dtype)
    for stats in (ours, theirs):
        sum((x.flatten() * g).sum() for x, g in zip(stats, upstream.to(stats[0].dtype), strict=True)).backward()
    assert ours_leaf.grad.dtype == logits.dtype
    assert_near_truth(ours_leaf.grad, grad, eager_leaf.grad, dtype=logits.dtype, gradient=True)


@each_case("token_stats")
@pytest.mark.parametrize("V", VOCABULARIES)
def test_against_float64(backend: str, dtype: torch.dtype, V: int) -> None:
    check(*make((2, 3), V, dtype), 0.7, backend)


@each_case("token_stats")
@pytest.mark.parametrize("offset", [3e4, -3e4])
def test_a_large_common_offset_costs_no_digits(backend: str, dtype: torch.dtype, offset: float) -> None:
    check(*make((4,), 65, dtype, offset=offset), 1.0, backend)


@each_backend("token_stats")
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 3)])
def test_free_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    logits, reference, targets = make(shape, 7, torch.float32)
    check(logits.reshape(*shape, 7), reference, targets, 1.3, backend)
    assert pf.token_logprobs(logits, targets, backend=backend).shape == shape


@each_backend("token_stats")
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_no_rows(backend: str, shape: tuple[int, ...]) -> None:
    logits, reference, targets = make(shape, 7, torch.float32)
    logits.requires_grad_()
    stats = pf.token_stats(logits, targets, ref_logits=reference, backend=backend)
    sum(x.sum() for x in stats).backward()
    assert [x.shape for x in stats] == [shape] * 3
    assert logits.grad.shape == logits.shape


@each_case("token_stats")
def test_the_three_functions_agree_to_the_last_bit(backend: str, dtype: torch.dtype) -> None:
    logits, _, targets = make((2, 3), 65, dtype)
    stats = pf.token_stats(logits, targets, temperature=0.7, backend=backend)
    assert stats.kl is None
    assert_same(pf.token_logprobs(logits, targets, temperature=0.7, backend=backend), stats.logprobs)
    assert_same(pf.entropy(logits, temperature=0.7, backend=backend), stats.entropy)
    loss = pf.policy_loss(
        logits,
        targets,
        None,
        torch.ones(2, 3),
        None,
        config=pf.PolicyLossConfig(temperature=0.7),
        backend=backend,
    )
    assert_same(loss.per_token, stats)


@each_backend("token_stats")
@pytest.mark.parametrize("field", ["logprobs", "entropy", "kl"])
def test_gradient_of_each_statistic_alone(backend: str, field: str) -> None:
    logits, reference, targets = make((4,), 9, torch.float32)
    logits.requires_grad_()
    stats = pf.token_stats(logits, targets, ref_logits=reference, backend=backend)
    getattr(stats, field).sum().backward()
    upstream = torch.zeros(3, 4)
    upstream[pf.TokenStats._fields.index(field)] = 1.0
    _, grad = truth(logits.detach(), reference, targets, 1.0, upstream)
    assert_near_truth(logits.grad, grad, dtype=torch.float32, gradient=True)


@each_backend("token_stats")
def test_int32_targets_equal_int64(backend: str) -> None:
    logits, reference, targets = make((2, 3), 33, torch.float32)
    wide, narrow = (pf.token_stats(logits, t, ref_logits=reference, backend=backend) for t in (targets, targets.int()))
    assert_same(wide, narrow)


@each_backend("token_stats")
def test_reference_of_another_dtype(backend: str) -> None:
    logits, reference, targets = make((2, 3), 33, torch.float32)
    half = reference.bfloat16()
    mixed = pf.token_stats(logits, targets, ref_logits=half, backend=backend)
    assert_same(mixed, pf.token_stats(logits, targets, ref_logits=half.float(), backend=backend))


@each_backend("token_stats")
def test_the_reference_gets_no_gradient(backend: str) -> None:
    logits, reference, targets = make((2, 3), 5, torch.float32)
    logits.requires_grad_()
    reference.requires_grad_()
    pf.token_stats(logits, targets, ref_logits=reference, backend=backend).kl.sum().backward()
    assert reference.grad is None


@pytest.mark.parametrize("field", ["logprobs", "entropy", "kl"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(field: str, masked: bool) -> None:
    logits, reference, targets = make((2, 3), 5, torch.float64)
    mask = torch.rand(2, 3) < 0.6 if masked else None

    def statistic(x: Tensor) -> Tensor:
        stats = pf.token_stats(x, targets, ref_logits=reference, mask=mask, temperature=0.7, backend="torch")
        return getattr(stats, field)

    assert torch.autograd.gradcheck(statistic, logits.requires_grad_())


def test_targets_are_checked_where_they_count() -> None:
    logits, targets = torch.zeros(1, 2, 4), torch.tensor([[1, 4]])
    assert pf.token_logprobs(logits, targets, mask=torch.tensor([[True, False]]))[0, 1] == 0
    with raises_exactly("token_logprobs: expected targets in [0, 4) where mask is True, got 4"):
        pf.token_logprobs(logits, targets)
