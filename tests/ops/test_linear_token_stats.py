"""linear_token_stats: values and gradients against float64, against token_stats, and the number of products."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ppo_fast as pf
from ppo_fast.ops._core.chunked_head import ChunkedHead
from ppo_fast.ops._core.head_buffers import NeedsGrad
from ppo_fast.ops._core.inputs import RowGrads
from ppo_fast.ops._core.linear_inputs import LinearCall
from tests import eager, oracles
from tests.helpers import INTERPRETED, assert_near_truth, assert_same, each_backend, each_case
from tests.ops.linear_cases import LEAVES, D, LinearCase, doubled_error, hide_uncounted, logits_of, make_linear_case
from tests.ops.policy_cases import B, T, V

TEMPERATURE = 0.7
N = B * T


def linear_stats(case: LinearCase, backend: str, leaves: list[Tensor], **options: Any) -> pf.TokenStats:
    """The op on a case, with its reference."""
    hidden, weight, bias = leaves
    reference = dict(zip(("ref_hidden", "ref_weight", "ref_bias"), case.head("ref_"), strict=True))
    options = {"bias": bias, "mask": case.rows.mask, "temperature": TEMPERATURE, **reference, **options}
    return pf.linear_token_stats(hidden, weight, case.rows.targets, **options, backend=backend)


def pulled_back(stats: pf.TokenStats, leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """Gradients for non-uniform upstream gradients [3, ...] of the three statistics."""
    return torch.autograd.grad(list(stats), leaves, list(upstream.to(stats.logprobs.dtype)))


def truth(case: LinearCase, softcap: float | None, upstream: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(logprobs, entropy, KL) and gradients from the oracles, row by row."""
    hidden, weight, bias = (x.double() for x in case.head())
    x = hidden.reshape(-1, D) @ weight.T + bias
    ref_logits = logits_of(tuple(part.double() for part in case.head("ref_")), softcap).reshape(-1, V)
    logits = x if softcap is None else softcap * torch.tanh(x / softcap)
    stats, dlogits = torch.zeros(3, N, dtype=torch.float64), torch.zeros(N, V, dtype=torch.float64)
    rows = upstream.reshape(3, -1)
    for i in case.rows.mask.flatten().nonzero()[:, 0].tolist():
        u, w = (oracles.log_softmax(z[i].numpy(), TEMPERATURE) for z in (logits, ref_logits))
        target = int(case.rows.targets.flatten()[i])
        stats[:, i] = torch.tensor([u[target], oracles.entropy(u), oracles.kl(u, w)])
        dlogits[i] = torch.from_numpy(oracles.pull_back(u, w, target, TEMPERATURE, *rows[:, i].tolist()))
    dx = dlogits if softcap is None else dlogits * torch.cosh(x / softcap) ** -2
    return list(stats), [dx @ weight, dx.T @ hidden.reshape(-1, D), dx.sum(0)]


def eager_stats(case: LinearCase, softcap: float | None, leaves: list[Tensor]) -> list[Tensor]:
    """The statistics by hand on materialized logits in the dtype of the hidden states, uncounted rows 0."""
    logits, ref_logits = logits_of(tuple(leaves), softcap), logits_of(case.head("ref_"), softcap)
    stats = eager.token_stats(logits, case.rows.targets, ref_logits, TEMPERATURE)
    return [x.masked_fill(~case.rows.mask, 0.0) for x in stats]


@each_case("linear_token_stats")
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk_size", [3] if INTERPRETED else [None, 1, 3, N, N + 1])
def test_values_and_gradients(backend: str, dtype: torch.dtype, softcap: float | None, chunk_size: int | None) -> None:
    case = make_linear_case("padded", dtype)
    upstream = torch.randn(3, B, T, dtype=torch.float64)
    expected, expected_gradients = truth(case, softcap, upstream)
    plain_leaves = [x.detach().requires_grad_() for x in case.head()]
    plain = eager_stats(case, softcap, plain_leaves)
    plain_gradients = pulled_back(pf.TokenStats(*plain), plain_leaves, upstream)
    leaves = [x.detach().requires_grad_() for x in hide_uncounted(case).head()]
    stats = linear_stats(hide_uncounted(case), backend, leaves, softcap=softcap, chunk_size=chunk_size)
    gradients = pulled_back(stats, leaves, upstream)
    for ours, theirs, by_hand in zip(stats, expected, plain, strict=True):
        assert_near_truth(ours, theirs, by_hand, dtype=dtype)
        assert not ours[~case.rows.mask].any()
    for name, ours, theirs, by_hand in zip(LEAVES, gradients, expected_gradients, plain_gradients, strict=True):
        assert ours.dtype == dtype
        if name == "weight" and dtype == torch.bfloat16 and chunk_size is not None:
            by_hand = doubled_error(by_hand, theirs)
        assert_near_truth(ours, theirs, by_hand, dtype=dtype, gradient=True)


@each_backend("linear_token_stats")
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_any_of_the_results_alone(backend: str, used: tuple[int, ...]) -> None:
    case = make_linear_case("padded")
    upstream = torch.zeros(3, B, T)
    upstream[list(used)] = torch.randn(len(used), B, T)
    leaves = [x.detach().requires_grad_() for x in case.head()]
    stats = linear_stats(case, backend, leaves)
    expected = pulled_back(stats, leaves, upstream)
    alone = linear_stats(case, backend, leaves)
    found = torch.autograd.grad([alone[i] for i in used], leaves, [upstream[i] for i in used])
    torch.testing.assert_close(found, expected)


@each_backend("linear_token_stats")
def test_a_loss_composed_of_it_equals_the_fused_one(backend: str) -> None:
    case = make_linear_case("padded")
    leaves = [x.detach().requires_grad_() for x in case.head()]
    stats = linear_stats(case, backend, leaves, temperature=1.0)
    r = (stats.logprobs - case.rows.old_logprobs).exp()
    objective = torch.minimum(r * case.rows.advantages, r.clamp(0.8, 1.2) * case.rows.advantages)
    loss = pf.masked_mean(-objective - 0.1 * stats.entropy, case.rows.mask)
    composed = torch.autograd.grad(loss, leaves)
    config = pf.PolicyLossConfig(ent_coef=0.1)
    rows = (case.rows.targets, case.rows.old_logprobs, case.rows.advantages, case.rows.mask)
    out = pf.linear_policy_loss(*leaves[:2], *rows, bias=leaves[2], config=config, backend=backend)
    torch.testing.assert_close(loss, out.loss)
    torch.testing.assert_close(composed, torch.autograd.grad(out.loss, leaves))


@each_backend("linear_token_stats")
def test_without_a_reference_there_is_no_kl(backend: str) -> None:
    hidden, weight, targets = torch.randn(2, 3, D), torch.randn(V, D), torch.randint(V, (2, 3))
    stats = pf.linear_token_stats(hidden, weight, targets, backend=backend)
    assert stats.kl is None
    expected = pf.token_stats(hidden @ weight.T, targets, backend=backend)
    torch.testing.assert_close(tuple(stats[:2]), tuple(expected[:2]))


@each_backend("linear_token_stats")
def test_a_frozen_part_gets_no_gradient(backend: str) -> None:
    case = make_linear_case("padded")
    leaves = [x.clone() for x in case.head()]
    leaves[1].requires_grad_()
    stats = linear_stats(case, backend, leaves)
    stats.logprobs.sum().backward()
    assert leaves[0].grad is None
    assert leaves[1].grad.any()
    assert leaves[2].grad is None


@each_backend("linear_token_stats")
def test_a_backward_may_come_twice(backend: str) -> None:
    case = make_linear_case("padded")
    leaves = [x.detach().requires_grad_() for x in case.head()]
    stats, upstream = linear_stats(case, backend, leaves), torch.randn(3, B, T)
    once, again = (torch.autograd.grad(list(stats), leaves, list(upstream), retain_graph=True) for _ in range(2))
    assert_same(once, again)


def weight_gradient(op: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> Tensor:
    """Of a loss of large hidden states and a small weight, whose logits are moderate."""
    generator = torch.Generator().manual_seed(5)
    hidden, weight = (torch.randn(n, D, generator=generator) for n in (N, V))
    leaf = (weight / 1024).to(dtype).requires_grad_()
    return torch.autograd.grad(op((1024 * hidden.abs()).to(dtype), leaf), leaf)[0].float()


@each_case("linear_token_stats", (torch.float16,))
def test_a_small_upstream_does_not_underflow_in_float16(backend: str, dtype: torch.dtype) -> None:
    """The gradient of a logit is below the smallest float16, 2^-24; that of the weight is not."""
    targets = torch.randint(V, (N,))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return 2.0**-26 * pf.linear_token_stats(hidden, weight, targets, backend=backend).logprobs.sum()

    expected = weight_gradient(loss, torch.float32)
    assert expected.abs().max() > 2.0**-15
    torch.testing.assert_close(weight_gradient(loss, dtype), expected, rtol=0.01, atol=2.0**-22)


@each_case("linear_policy_loss", (torch.float16,))
def test_a_sum_over_rows_does_not_overflow_in_float16(backend: str, dtype: torch.dtype) -> None:
    """Before it is divided by the number of tokens it is above the largest float16, 65504."""
    targets, advantages = torch.zeros(N, dtype=torch.long), torch.full((N,), 50.0)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return pf.linear_policy_loss(hidden, weight, targets, None, advantages, None, backend=backend).loss

    expected = weight_gradient(loss, torch.float32)
    assert 65504 < N * expected.abs().max() < N * 65504
    torch.testing.assert_close(weight_gradient(loss, dtype), expected, rtol=0.01, atol=16)


@each_backend("linear_token_stats")
def test_a_second_sweep_over_the_same_rows_is_like_the_first(backend: str) -> None:
    """The logits that the first has overwritten are computed again."""
    inputs = torch.randn(N, D), torch.randn(V, D), None, torch.randint(V, (1, N)), *[None] * 4
    head = ChunkedHead(LinearCall(*inputs, None, 1.0, None, False, backend), NeedsGrad(True, True, False))
    stats, grads = head.stats(), RowGrads(torch.ones(1, N), None, None)
    assert_same(tuple(head.gradients(grads, stats)), tuple(head.gradients(grads, stats)))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck(softcap: float | None) -> None:
    case = make_linear_case("padded", torch.float64)
    leaves = [x.detach().requires_grad_() for x in case.head()]

    def stats(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_stats(case, "torch", list(leaves), softcap=softcap, chunk_size=5))

    assert torch.autograd.gradcheck(stats, leaves)


def products(call: Callable[[], object]) -> float:
    """Floating-point operations of the call's matrix products, in units of N*D*V."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as record:
        call()
    return sum(e.flops for e in record.events() if e.name in ("aten::mm", "aten::addmm")) / (N * D * V)


def head_inputs(counted: int = N) -> dict[str, Tensor]:
    """Everything trained, the first ``counted`` rows."""
    return {
        "hidden": torch.randn(N, D, requires_grad=True),
        "weight": torch.randn(V, D, requires_grad=True),
        "targets": torch.randint(V, (N,)),
        "mask": torch.arange(N) < counted,
    }


def backward_of(op: Callable[..., object], **inputs: object) -> None:
    """Forward and backward of the loss, or of the log-probabilities."""
    out = op(**inputs)
    (out.loss if isinstance(out, pf.LossOutput) else out.logprobs.sum()).backward()


def loss_of(**options: object) -> Callable[..., pf.LossOutput]:
    """The policy loss with unit advantages."""
    ratio = str(options.pop("ratio", "token"))
    config = pf.PolicyLossConfig(ratio=ratio, ent_coef=0.1)
    rows = {"old_logprobs": None, "advantages": torch.ones(N), "cu_seqlens": torch.tensor([0, 3, N])}
    return functools.partial(pf.linear_policy_loss, config=config, **{"chunk_size": 4, **rows, **options})


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_the_products_are_as_few_as_promised(backend: str) -> None:
    stats = functools.partial(pf.linear_token_stats, chunk_size=4, backend=backend)
    loss, sequence = loss_of(backend=backend), loss_of(backend=backend, ratio="sequence")
    whole = loss_of(backend=backend, ratio="sequence", chunk_size=N)
    assert products(lambda: backward_of(stats, **head_inputs())) == 8
    assert products(lambda: backward_of(loss, **head_inputs())) == 6
    assert products(lambda: backward_of(loss, **head_inputs(N // 4))) == 6 / 4
    assert products(lambda: backward_of(sequence, **head_inputs())) == 8
    assert products(lambda: backward_of(whole, **head_inputs())) == 6
    for frozen in ("hidden", "weight"):
        inputs = {k: v.detach() if k == frozen else v for k, v in head_inputs().items()}
        assert products(lambda inputs=inputs: backward_of(loss, **inputs)) == 4
        assert products(lambda inputs=inputs: backward_of(stats, **inputs)) == 6
    with torch.no_grad():
        assert products(lambda: stats(**head_inputs())) == 2
        assert products(lambda: loss(**head_inputs())) == 2
