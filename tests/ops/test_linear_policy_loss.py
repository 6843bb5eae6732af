"""linear_policy_loss against float64, against policy_loss on materialized logits, and what it owes for being linear."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.ops._core import head_buffers
from tests.helpers import INTERPRETED, assert_same, each_backend, each_case
from tests.ops.linear_cases import (
    D,
    check,
    hide_uncounted,
    make_linear_case,
    references,
    row_inputs,
    run,
    run_materialized,
)
from tests.ops.policy_cases import OPTIONS, B, T, V, option_grid

LAYOUTS = ("padded", "packed")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
N = B * T
ALL = pf.PolicyLossConfig(
    clip_low=0.1, clip_high=0.3, dual_clip=1.5, penalty_coef=0.3, ent_coef=0.1, kl_coef=0.2, temperature=0.7
)
# One combination of the options in so many: against the oracle, and against policy_loss.
ORACLE_FRACTION, FRACTION = (1499, 743) if INTERPRETED else (227, 149)
ESTIMATORS = [("token", "full"), ("sequence", "k3"), ("token", "k3"), ("sequence", "full")][: 2 if INTERPRETED else 4]


def close(ours: Any, theirs: Any) -> None:
    """Equal to float32 rounding, in nested results."""
    if isinstance(ours, dict):
        ours, theirs = tuple(ours.values()), tuple(theirs.values())
    if isinstance(ours, (tuple, list)):
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)
    elif ours is not None:
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@each_backend("linear_policy_loss")
@each_layout
def test_a_fraction_of_all_options(backend: str, layout: str) -> None:
    case = make_linear_case(layout)
    for i, options in enumerate(option_grid(ORACLE_FRACTION)):
        check(
            case, pf.PolicyLossConfig(**options), backend, softcap=(None, 5.0)[i % 2], chunk_size=(None, 3)[i // 2 % 2]
        )


@each_backend("linear_policy_loss")
@each_layout
def test_equals_policy_loss_on_materialized_logits(backend: str, layout: str) -> None:
    case = make_linear_case(layout)

    def loss_of(*inputs: Any, **options: Any) -> pf.LossOutput:
        return pf.policy_loss(*inputs, **options, backend=backend)

    weights = torch.rand(case.rows.targets.shape) + 0.5
    for i, options in enumerate(option_grid(FRACTION)):
        softcap = (None, 5.0)[i % 2]
        config, more = pf.PolicyLossConfig(**options), {"importance_weights": weights, "denominator": 7}
        expected, expected_gradients = run_materialized(loss_of, case, config, softcap, **more)
        out, gradients = run(case, config, backend, softcap=softcap, chunk_size=5, **more)
        close((tuple(out), gradients), (tuple(expected), expected_gradients))


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("aggregation", OPTIONS["aggregation"])
@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_one_tile_of_all_rows(backend: str, aggregation: str, estimator: str) -> None:
    softcap = 5.0 if (estimator == "full") == (aggregation == "token-mean") else None
    case = hide_uncounted(make_linear_case("padded"))
    config = dataclasses.replace(ALL, aggregation=aggregation, kl_estimator=estimator)
    more = {"importance_weights": torch.rand(case.rows.targets.shape) + 0.5, "denominator": 7, "softcap": softcap}
    whole, tiles = (run(case, config, backend, chunk_size=size, **more) for size in (None, 5))
    assert whole[0].per_token.kl.any()
    close(whole, tiles)


@each_case("linear_policy_loss")
@each_layout
def test_dtypes(backend: str, dtype: torch.dtype, layout: str) -> None:
    case = make_linear_case(layout, dtype)
    for i, (ratio, estimator) in enumerate(ESTIMATORS, start=LAYOUTS.index(layout)):
        softcap = (None, 5.0)[i % 2]
        config = pf.PolicyLossConfig(
            dual_clip=1.5,
            penalty_coef=0.1,
            ent_coef=0.1,
            kl_coef=0.1,
            kl_estimator=estimator,
            ratio=ratio,
            aggregation="seq-mean-token-mean",
        )
        for chunk_size in (3,) if INTERPRETED else (None, 3):
            check(case, config, backend, softcap, chunk_size=chunk_size)


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("chunk_size", [1, N + 1] if INTERPRETED else [1, 3, N, N + 1])
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_chunk_sizes(backend: str, chunk_size: int, ratio: str) -> None:
    config = pf.PolicyLossConfig(ratio=ratio, ent_coef=0.1, kl_coef=0.2, kl_estimator="full")
    check(make_linear_case("padded"), config, backend, chunk_size=chunk_size)


@each_backend("linear_policy_loss")
def test_a_reference_without_a_head_shares_the_policys(backend: str) -> None:
    case, config = make_linear_case("padded"), pf.PolicyLossConfig(kl_estimator="full", kl_coef=0.5)
    ref_hidden = case.hidden + 0.1
    shared = {"ref_hidden": ref_hidden, "ref_weight": None, "ref_bias": None}
    out, gradients = run(case, config, backend, **shared)
    own, own_gradients = run(case, config, backend, ref_hidden=ref_hidden, ref_weight=case.weight, ref_bias=case.bias)
    assert_same((out.loss, *gradients), (own.loss, *own_gradients))
    bias = case.bias + torch.arange(V)
    other, _ = run(case, config, backend, ref_hidden=ref_hidden, ref_weight=None, ref_bias=bias)
    explicit, _ = run(case, config, backend, ref_hidden=ref_hidden, ref_weight=case.weight, ref_bias=bias)
    assert_same(other.loss, explicit.loss)
    assert other.loss != out.loss
    headless, _ = run(case, config, backend, ref_hidden=ref_hidden, ref_weight=case.weight, ref_bias=None)
    zero, _ = run(case, config, backend, ref_hidden=ref_hidden, ref_weight=case.weight, ref_bias=torch.zeros(V))
    assert_same(headless.loss, zero.loss)


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("trained", [*itertools.product([True, False], repeat=3)][:-1])
def test_a_frozen_part_gets_no_gradient_and_changes_no_other(backend: str, trained: tuple[bool, ...]) -> None:
    case = hide_uncounted(make_linear_case("padded"))
    _, expected = run(case, ALL, backend)
    leaves = [x.clone().requires_grad_(wanted) for x, wanted in zip(case.head(), trained, strict=True)]
    hidden, weight, bias = leaves
    inputs = {**row_inputs(case), **references(case, ALL)}
    pf.linear_policy_loss(hidden, weight, bias=bias, **inputs, config=ALL, backend=backend).loss.backward()
    assert_same(
        tuple(x.grad for x in leaves), tuple(g if wanted else None for g, wanted in zip(expected, trained, strict=True))
    )


@each_backend("linear_policy_loss")
def test_only_the_head_gets_a_gradient(backend: str) -> None:
    case = make_linear_case("padded")
    config = pf.PolicyLossConfig(kl_estimator="full", kl_coef=0.1)
    inputs = {**row_inputs(case), **references(case, config), "importance_weights": torch.ones(B, T)}
    inputs = {
        k: v.clone().requires_grad_() if v is not None and v.is_floating_point() else v for k, v in inputs.items()
    }
    hidden = case.hidden.clone().requires_grad_()
    pf.linear_policy_loss(hidden, case.weight, **inputs, config=config, backend=backend).loss.backward()
    assert hidden.grad.any()
    assert all(v.grad is None for v in inputs.values() if v is not None)


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_the_gradient_scales_with_its_upstream_and_again(backend: str, ratio: str) -> None:
    case, config = make_linear_case("padded"), pf.PolicyLossConfig(ratio=ratio, ent_coef=0.1)
    leaves = [x.requires_grad_() for x in case.head()]
    loss = pf.linear_policy_loss(*leaves[:2], bias=leaves[2], **row_inputs(case), config=config, backend=backend).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    quadrupled = torch.autograd.grad(-4 * loss, leaves)
    assert_same(tuple(once), tuple(again))
    assert_same(tuple(quadrupled), tuple(-4 * x for x in once))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(once, again, strict=True))


@each_backend("linear_policy_loss")
def test_without_gradients_the_values_are_the_same_bits(backend: str) -> None:
    case = make_linear_case("padded")
    out, _ = run(case, ALL, backend)
    inputs = {**row_inputs(case), **references(case, ALL)}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            frozen = pf.linear_policy_loss(*case.head()[:2], bias=case.bias, **inputs, config=ALL, backend=backend)
        assert not frozen.loss.requires_grad
        assert_same((frozen.loss, frozen.metrics), (out.loss.detach(), out.metrics))


@each_backend("linear_policy_loss")
def test_on_policy_the_ratio_is_exactly_one(backend: str) -> None:
    case = make_linear_case("padded")
    with torch.no_grad():
        old = pf.linear_token_stats(
            case.hidden, case.weight, case.rows.targets, bias=case.bias, mask=case.rows.mask, backend=backend
        )
    out, _ = run(case, pf.PolicyLossConfig(), backend, old_logprobs=old.logprobs)
    assert out.metrics["ratio_mean"] == out.metrics["ratio_max"] == 1
    assert_same(out.per_token.logprobs, old.logprobs)


@each_backend("linear_policy_loss")
def test_a_view_of_hidden_states_is_taken_as_it_is(backend: str) -> None:
    case = make_linear_case("padded")
    _, expected = run(case, ALL, backend)
    # Time-major storage with a prompt before and a token after the response, and every second hidden feature.
    storage = torch.full((T + 3, B, 2 * D), torch.nan)
    view = storage.transpose(0, 1)[:, 2:-1, ::2]
    view.copy_(case.hidden)
    _, gradients = run(case._replace(hidden=view), ALL, backend)
    assert_same(tuple(gradients), tuple(expected))


@each_backend("linear_policy_loss")
def test_a_transposed_weight(backend: str) -> None:
    case = make_linear_case("padded")
    out, gradients = run(case._replace(weight=case.weight.T.contiguous().T), ALL, backend)
    expected, expected_gradients = run(case, ALL, backend)
    close((out.loss, gradients), (expected.loss, expected_gradients))


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_tiles_smaller_than_a_chunk(backend: str, ratio: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_linear_case("padded")
    config = pf.PolicyLossConfig(ratio=ratio, ent_coef=0.1, kl_coef=0.2, kl_estimator="full")
    monkeypatch.setitem(head_buffers._TILE, "cpu", 2)
    monkeypatch.setattr(head_buffers, "_PRODUCT_ROWS", 1)
    for chunk_size in (5, 9):
        check(case, config, backend, softcap=5.0, chunk_size=chunk_size)


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_nothing_counted(backend: str, ratio: str) -> None:
    case = make_linear_case("padded")
    nothing = hide_uncounted(case._replace(rows=case.rows._replace(mask=torch.zeros(B, T, dtype=torch.bool))))
    config = pf.PolicyLossConfig(ratio=ratio, ent_coef=0.1, kl_coef=0.1)
    out, gradients = run(nothing, config, backend)
    assert not any(x.any() for x in (out.loss, *out.metrics.values(), *gradients))


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_no_tokens(backend: str, ratio: str) -> None:
    hidden, weight = torch.zeros(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    empty, config = torch.zeros(0), pf.PolicyLossConfig(ratio=ratio)
    targets, offsets = torch.zeros(0, dtype=torch.long), torch.tensor([0, 0])
    out = pf.linear_policy_loss(
        hidden, weight, targets, empty, empty, None, config=config, cu_seqlens=offsets, backend=backend
    )
    out.loss.backward()
    assert not any(x.any() for x in (out.loss, *out.metrics.values(), weight.grad))
    assert hidden.grad.shape == (0, D)


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 1, 3)])
def test_free_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    hidden, weight, targets = torch.randn(*shape, D), torch.randn(V, D), torch.randint(V, shape)
    old, advantages = torch.randn(shape) - 1.6, torch.randn(shape)
    out = pf.linear_policy_loss(hidden, weight, targets, old, advantages, None, backend=backend)
    flat = (hidden.view(-1, D), weight, *(x.reshape(-1) for x in (targets, old, advantages)))
    expected = pf.linear_policy_loss(*flat, None, backend=backend)
    assert_same((out.loss, out.metrics), (expected.loss, expected.metrics))
    assert {x.shape for x in out.per_token[:2]} == {torch.Size(shape)}


@each_case("linear_policy_loss", (torch.float16,))
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_a_large_denominator_does_not_underflow_in_float16(backend: str, dtype: torch.dtype, ratio: str) -> None:
    case, config = make_linear_case("padded", dtype), pf.PolicyLossConfig(ratio=ratio, ent_coef=0.1)
    leaves = [x.requires_grad_() for x in case.head()]
    inputs = row_inputs(case)

    def gradients(denominator: float) -> tuple[Tensor, ...]:
        out = pf.linear_policy_loss(
            *leaves[:2], bias=leaves[2], **inputs, config=config, denominator=denominator, backend=backend
        )
        return torch.autograd.grad(out.loss * denominator, leaves)

    assert_same(gradients(2.0**30), gradients(1.0))


@each_backend("linear_policy_loss")
def test_autocast_casts_once_as_linear_does(backend: str) -> None:
    case = make_linear_case("padded")
    half = case._replace(**{name: getattr(case, name).bfloat16() for name in case._fields[:-1]})
    expected, expected_gradients = run(half, ALL, backend)
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = run(case, ALL, backend)
    assert_same((out.loss, out.metrics), (expected.loss, expected.metrics))
    assert_same(tuple(gradients), tuple(x.float() for x in expected_gradients))
    wide = make_linear_case("padded", torch.float64)
    plain, _ = run(wide, ALL, "torch")
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = run(wide, ALL, "torch")
    assert_same(inside.loss, plain.loss)


@pytest.mark.parametrize("estimator", ["k3", "full"])
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
@each_layout
def test_gradcheck(layout: str, ratio: str, estimator: str) -> None:
    case = make_linear_case(layout, torch.float64)
    config = pf.PolicyLossConfig(
        dual_clip=1.5,
        penalty_coef=0.3,
        ent_coef=0.1,
        kl_coef=0.2,
        kl_estimator=estimator,
        ratio=ratio,
        aggregation="seq-mean-token-mean",
    )
    inputs = {**row_inputs(case), **references(case, config)}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pf.linear_policy_loss(
            hidden, weight, bias=bias, **inputs, softcap=5.0, chunk_size=5, config=config, backend="torch"
        ).loss

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in case.head()], fast_mode=True)
