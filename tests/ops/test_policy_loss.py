"""policy_loss: values, gradients and metrics against float64 over its options, layouts and dtypes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests.helpers import INTERPRETED, assert_near_truth, assert_same, each_backend, each_case
from tests.ops.policy_cases import OPTIONS, B, Case, T, V, allowed, check, make_case, option_grid, run, truth

LAYOUTS = ("padded", "packed")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
# One combination in 53 holds every triple of options; one in 373 under the interpreter, which is slow.
FRACTION = 373 if INTERPRETED else 53
EVERYTHING = pf.PolicyLossConfig(
    clip_low=0.1, clip_high=0.3, dual_clip=1.5, penalty_coef=0.3, ent_coef=0.1, kl_coef=0.2, temperature=0.7
)


@each_backend("policy_loss")
@each_layout
def test_a_fraction_of_all_options(backend: str, layout: str) -> None:
    case = make_case(layout)
    for options in option_grid(FRACTION):
        check(case, pf.PolicyLossConfig(**options), backend)


@pytest.mark.slow
@each_backend("policy_loss")
@each_layout
def test_all_options(backend: str, layout: str) -> None:
    case = make_case(layout)
    for options in option_grid():
        check(case, pf.PolicyLossConfig(**options), backend)


def test_the_fraction_holds_every_triple_of_options() -> None:
    grid = list(option_grid(53))
    for names in itertools.combinations(OPTIONS, 3):
        met = {tuple(options[n] for n in names) for options in grid}
        triples = set(itertools.product(*(OPTIONS[n] for n in names)))
        assert met == {triple for triple in triples if allowed(dict(zip(names, triple, strict=True)))}


@each_layout
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_the_batch_reaches_every_branch(layout: str, ratio: str) -> None:
    config = pf.PolicyLossConfig(dual_clip=1.5, ratio=ratio)
    metrics = truth(make_case(layout), config).metrics
    assert 0 < metrics["dual_clipfrac"] < 0.5
    assert 0 < metrics["clipfrac"] < 1
    assert metrics["ratio_max"] > 1.5
    one_sided = pf.PolicyLossConfig(clip_high=None, ratio=ratio)
    assert 0 < truth(make_case(layout), one_sided).metrics["clipfrac"] < metrics["clipfrac"]


@each_case("policy_loss")
@each_layout
@pytest.mark.parametrize("estimator", ["k3", "full"])
def test_dtypes(backend: str, dtype: torch.dtype, layout: str, estimator: str) -> None:
    kinds = list(itertools.product(OPTIONS["ratio"], OPTIONS["aggregation"]))
    for ratio, aggregation in kinds[-2:] if INTERPRETED else kinds:
        config = pf.PolicyLossConfig(
            dual_clip=1.5,
            penalty_coef=0.1,
            ent_coef=0.1,
            kl_coef=0.1,
            kl_estimator=estimator,
            ratio=ratio,
            aggregation=aggregation,
        )
        check(make_case(layout, dtype), config, backend)


@each_case("policy_loss")
def test_outputs_are_in_the_accumulation_dtype(backend: str, dtype: torch.dtype) -> None:
    out, _ = run(make_case("padded", dtype), EVERYTHING, backend)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {x.dtype for x in (out.loss, *out.metrics.values(), *out.per_token)} == {wanted}


@each_backend("policy_loss")
@each_layout
def test_importance_weights(backend: str, layout: str) -> None:
    case = make_case(layout)
    check(case, EVERYTHING, backend, importance_weights=torch.rand(case.targets.shape) + 0.5)


@each_backend("policy_loss")
@pytest.mark.parametrize("name", ["advantages", "importance_weights"])
def test_one_number_per_sequence(backend: str, name: str) -> None:
    case = make_case("padded")
    per_sequence = torch.randn(B, 1).abs()
    narrow = run(case, EVERYTHING, backend, **{name: per_sequence})
    wide = run(case, EVERYTHING, backend, **{name: per_sequence.expand(B, T).contiguous()})
    assert_same((*tuple(narrow[0]), narrow[1]), (*tuple(wide[0]), wide[1]))


@each_backend("policy_loss")
@each_layout
@pytest.mark.parametrize("aggregation", OPTIONS["aggregation"])
@pytest.mark.parametrize("kind", [float, int, torch.tensor])
def test_denominator(backend: str, layout: str, aggregation: str, kind: type) -> None:
    case, config = make_case(layout), pf.PolicyLossConfig(aggregation=aggregation, ent_coef=0.1, kl_coef=0.1)
    expected = truth(case, config, denominator=37.0)
    out, grad = run(case, config, backend, denominator=kind(37))
    assert_near_truth(out.loss, expected.loss, dtype=torch.float32)
    assert_near_truth(grad, expected.grad, dtype=torch.float32, gradient=True)
    assert_near_truth(out.metrics["policy_loss"], expected.metrics["policy_loss"], dtype=torch.float32)


@each_backend("policy_loss")
@pytest.mark.parametrize("aggregation", OPTIONS["aggregation"])
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_micro_batches_add_up(backend: str, aggregation: str, ratio: str) -> None:
    case = make_case("padded")
    config = pf.PolicyLossConfig(aggregation=aggregation, ratio=ratio, ent_coef=0.1, kl_coef=0.2)
    whole, grad = run(case, config, backend)
    denominator = int(case.mask.sum()) if aggregation == "token-mean" else int(case.mask.any(1).sum())
    rows = [Case(*(x[i : i + 1] for x in case[:-1]), None) for i in range(B)]
    parts = [run(row, config, backend, denominator=denominator) for row in rows]
    torch.testing.assert_close(sum(out.loss for out, _ in parts), whole.loss)
    torch.testing.assert_close(sum(out.metrics["policy_loss"] for out, _ in parts), whole.metrics["policy_loss"])
    torch.testing.assert_close(torch.cat([g for _, g in parts]), grad)
    tokens = torch.stack([out.metrics["tokens"] for out, _ in parts])
    for name in ("entropy", "kl", "approx_kl", "clipfrac", "ratio_mean"):
        values = torch.stack([out.metrics[name] for out, _ in parts])
        torch.testing.assert_close((values * tokens).sum() / tokens.sum(), whole.metrics[name])


@each_backend("policy_loss")
def test_no_old_logprobs_means_the_present_ones(backend: str) -> None:
    case = make_case("padded")
    out, grad = run(case, EVERYTHING, backend, old_logprobs=None)
    same, same_grad = run(case, EVERYTHING, backend, old_logprobs=out.per_token.logprobs)
    assert_same((out.loss, out.metrics, grad), (same.loss, same.metrics, same_grad))
    assert out.metrics["ratio_mean"] == out.metrics["ratio_max"] == 1
    assert grad[case.mask].any()


@each_backend("policy_loss")
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
@pytest.mark.parametrize("shift", [25.0, -25.0])
def test_log_ratios_are_clamped_and_carry_no_gradient_outside(backend: str, ratio: str, shift: float) -> None:
    case = make_case("padded")
    old = case.old_logprobs - shift
    config = pf.PolicyLossConfig(clip_low=None, clip_high=None, penalty_coef=0.1, ratio=ratio)
    out, grad = run(case, config, backend, old_logprobs=old)
    assert not grad.any()
    torch.testing.assert_close(out.metrics["ratio_max"], torch.tensor(math.exp(math.copysign(20, shift))))
    expected = truth(case, config, old_logprobs=old)
    assert_near_truth(out.loss, expected.loss, dtype=torch.float32)


@each_backend("policy_loss")
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
def test_cispo_pulls_tokens_outside_the_clip_by_a_bounded_weight(backend: str, ratio: str) -> None:
    """A token far above the clip has gradient -(1 + clip_high)*A/N in its log-probability; clip would give it none."""
    case = make_case("padded")
    config = pf.PolicyLossConfig(objective="cispo", clip_low=None, ratio=ratio)
    far = {"old_logprobs": case.old_logprobs - 25, "advantages": torch.ones(B, T)}
    out, grad = run(case, config, backend, **far)
    assert out.metrics["clipfrac"] == 1
    probs = torch.softmax(case.logits, -1)
    onehot = torch.nn.functional.one_hot(case.targets, V)
    pull = -1.2 / case.mask.sum() * (onehot - probs)
    torch.testing.assert_close(grad, torch.where(case.mask[..., None], pull, 0.0))
    counted = out.per_token.logprobs[case.mask]
    torch.testing.assert_close(out.loss, -1.2 * counted.mean())


@each_backend("policy_loss")
@pytest.mark.parametrize("name", ["advantages", "importance_weights"])
def test_cispo_of_a_token_of_weight_0_is_0_at_any_probability(backend: str, name: str) -> None:
    case = make_case("padded")
    banned = case.logits.clone()
    banned[0, 0, case.targets[0, 0]] = -torch.inf
    weights = torch.ones(B, T)
    weights[0, 0] = 0.0
    more = {name: weights * (case.advantages if name == "advantages" else 1.0)}
    config = pf.PolicyLossConfig(objective="cispo")
    out, grad = run(case._replace(logits=banned), config, backend, **more)
    assert out.loss.isfinite()
    assert not grad[0, 0].any()
    assert run(case._replace(logits=banned), config, backend)[0].loss.abs() == torch.inf


@each_backend("policy_loss")
@pytest.mark.parametrize("name", ["penalty_coef", "ent_coef", "kl_coef"])
def test_a_coefficient_may_be_a_0d_tensor(backend: str, name: str) -> None:
    case = make_case("padded")
    number = run(case, pf.PolicyLossConfig(**{name: 0.3}), backend)
    for dtype in (torch.float32, torch.float64):
        tensor = run(case, pf.PolicyLossConfig(**{name: torch.tensor(0.3, dtype=dtype)}), backend)
        assert_same((number[0].loss, number[1]), (tensor[0].loss, tensor[1]))


@each_backend("policy_loss")
def test_a_coefficient_of_zero_leaves_an_infinite_term_out(backend: str) -> None:
    case = make_case("padded")
    config = pf.PolicyLossConfig(kl_estimator="full")
    banned = case.ref_logits.clone()
    banned[..., 0] = -torch.inf
    out, grad = run(case._replace(ref_logits=banned), config, backend)
    plain, plain_grad = run(case, config, backend)
    assert_same((out.loss, grad), (plain.loss, plain_grad))
    assert out.metrics["kl"] == torch.inf
    weighted, _ = run(case._replace(ref_logits=banned), pf.PolicyLossConfig(kl_estimator="full", kl_coef=0.1), backend)
    assert weighted.loss == torch.inf


@each_backend("policy_loss")
def test_without_a_reference(backend: str) -> None:
    case = make_case("padded")
    logits = case.logits.clone().requires_grad_()
    out = pf.policy_loss(logits, *case[1:5], config=pf.PolicyLossConfig(ent_coef=0.1), backend=backend)
    with_reference, grad = run(case, pf.PolicyLossConfig(ent_coef=0.1), backend)
    out.loss.backward()
    assert_same((out.loss, logits.grad), (with_reference.loss, grad))
    assert out.per_token.kl is None
    assert out.metrics["kl"] == 0
    assert with_reference.metrics["kl"] != 0


@each_backend("policy_loss")
def test_only_the_logits_get_a_gradient(backend: str) -> None:
    case = make_case("padded")
    inputs = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in case._asdict().items() if v is not None}
    inputs.pop("ref_logprobs")
    weights = torch.ones(B, T, requires_grad=True)
    config = pf.PolicyLossConfig(kl_estimator="full", kl_coef=0.1)
    pf.policy_loss(**inputs, importance_weights=weights, config=config, backend=backend).loss.backward()
    assert [k for k, v in inputs.items() if v.grad is not None] == ["logits"]
    assert weights.grad is None


@each_backend("policy_loss")
def test_the_gradient_scales_with_its_upstream(backend: str) -> None:
    case = make_case("padded")
    _, grad = run(case, EVERYTHING, backend)
    logits = case.logits.clone().requires_grad_()
    out = pf.policy_loss(logits, *case[1:5], ref_logprobs=case.ref_logprobs, config=EVERYTHING, backend=backend)
    (-4 * out.loss).backward()
    torch.testing.assert_close(logits.grad, -4 * grad)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
@pytest.mark.parametrize("ratio", OPTIONS["ratio"])
@each_layout
def test_gradcheck(layout: str, ratio: str, estimator: str) -> None:
    case = make_case(layout, torch.float64)
    config = pf.PolicyLossConfig(
        dual_clip=1.5,
        penalty_coef=0.3,
        ent_coef=0.1,
        kl_coef=0.2,
        kl_estimator=estimator,
        ratio=ratio,
        aggregation="seq-mean-token-mean",
    )
    reference = {"ref_logits": case.ref_logits} if estimator == "full" else {"ref_logprobs": case.ref_logprobs}

    def loss(logits: Tensor) -> Tensor:
        return pf.policy_loss(
            logits, *case[1:5], **reference, cu_seqlens=case.cu_seqlens, config=config, backend="torch"
        ).loss

    assert torch.autograd.gradcheck(loss, case.logits.requires_grad_())


@each_backend("policy_loss")
@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
@pytest.mark.parametrize("options", [{}, {"ratio": "sequence"}, {"aggregation": "seq-mean-token-mean"}])
def test_no_tokens(backend: str, offsets: list[int], options: dict[str, str]) -> None:
    logits = torch.zeros(0, V, requires_grad=True)
    out = pf.policy_loss(
        logits,
        torch.zeros(0, dtype=torch.long),
        torch.zeros(0),
        torch.zeros(0),
        None,
        config=pf.PolicyLossConfig(ent_coef=0.1, **options),
        cu_seqlens=torch.tensor(offsets),
        backend=backend,
    )
    out.loss.backward()
    assert not any(x.any() for x in (out.loss, *out.metrics.values()))
    assert logits.grad.shape == (0, V)


@each_backend("policy_loss")
@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 1, 3)])
def test_free_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, V)
    targets = torch.randint(V, shape)
    old, advantages = torch.randn(shape) - 1.6, torch.randn(shape)
    out = pf.policy_loss(logits, targets, old, advantages, None, backend=backend)
    flat = (logits.view(-1, V), *(x.reshape(-1) for x in (targets, old, advantages)))
    expected = pf.policy_loss(*flat, None, backend=backend)
    assert_same((out.loss, out.metrics), (expected.loss, expected.metrics))
    assert {x.shape for x in out.per_token[:2]} == {torch.Size(shape)}


@each_backend("policy_loss")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_per_token_inputs_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    case = make_case("padded")
    names = ("old_logprobs", "advantages", "ref_logprobs")
    narrow = case._replace(**{name: getattr(case, name).to(dtype) for name in names})
    wide = case._replace(**{name: getattr(narrow, name).float() for name in names})
    (ours, grad), (theirs, same_grad) = run(narrow, EVERYTHING, backend), run(wide, EVERYTHING, backend)
    assert_same((ours.loss, ours.metrics, grad), (theirs.loss, theirs.metrics, same_grad))


@each_backend("policy_loss")
@pytest.mark.parametrize("shift", [25.0, -25.0])
def test_k3_is_clamped_and_carries_no_gradient_outside(backend: str, shift: float) -> None:
    case = make_case("padded")._replace(advantages=torch.zeros(B, T))
    far = case._replace(ref_logprobs=case.ref_logprobs + shift)
    config = pf.PolicyLossConfig(kl_coef=0.2)
    out, grad = run(far, config, backend)
    assert not grad.any()
    assert_near_truth(out.loss, truth(far, config).loss, dtype=torch.float32)
    assert run(case, config, backend)[1].any()


@each_backend("policy_loss")
def test_a_second_backward_repeats_the_first(backend: str) -> None:
    case = make_case("padded")
    logits = case.logits.clone().requires_grad_()
    loss = pf.policy_loss(logits, *case[1:5], config=pf.PolicyLossConfig(ent_coef=0.1), backend=backend).loss
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert_same(torch.autograd.grad(loss, logits, retain_graph=True)[0], kept)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, logits)[0], 3 * kept)


@each_backend("policy_loss")
@pytest.mark.parametrize("inplace", [False, True])
def test_an_undefined_gradient_of_the_loss_gives_none(backend: str, inplace: bool) -> None:
    case = make_case("padded")
    logits = case.logits.clone().requires_grad_()
    loss = pf.policy_loss(logits * 1.5, *case[1:5], inplace=inplace, backend=backend).loss
    undefined = torch._C._functions.UndefinedGrad()(loss)
    assert torch.autograd.grad(undefined, logits, allow_unused=True) == (None,)
