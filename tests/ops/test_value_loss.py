"""value_loss: value, gradient and metrics against float64."""

import itertools

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests import eager, oracles
from tests.helpers import assert_near_truth, assert_same, each_backend, each_case

B, T = 4, 6
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
LAYOUTS = {"padded": None, "packed": torch.tensor([0, 5, 5, 11, 18, 24])}


def make(layout: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], oracles.Segments]:
    """(inputs, the rows of each sequence): 24 tokens, one row of the padded layout uncounted."""
    values = torch.randn(B, T).to(dtype)
    old = values.float() + 0.8 * torch.randn(B, T)
    inputs = {"values": values, "returns": torch.randn(B, T), "mask": torch.rand(B, T) < 0.7, "old_values": old}
    inputs["mask"][1] = False
    offsets = LAYOUTS[layout]
    if offsets is None:
        return inputs, oracles.padded_segments(B, T)
    flat = {name: x.flatten() for name, x in inputs.items()}
    return {**flat, "cu_seqlens": offsets}, oracles.packed_segments(offsets.tolist())


def run(inputs: dict[str, Tensor], **options: object) -> tuple[pf.LossOutput, Tensor]:
    """(output, gradient of the values)."""
    leaf = inputs["values"].detach().requires_grad_()
    out = pf.value_loss(**{**inputs, "values": leaf}, **options)
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return out, grad


@each_case("value_loss")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clip", [None, 0.3])
def test_against_float64(backend: str, dtype: torch.dtype, layout: str, clip: float | None) -> None:
    inputs, segments = make(layout, dtype)
    flat = {k: x.double().flatten().numpy() for k, x in inputs.items() if k not in ("mask", "cu_seqlens")}
    counted = inputs["mask"].flatten().numpy()
    for aggregation, denominator in itertools.product(AGGREGATIONS, (None, 7.5)):
        options = {"clip": clip, "aggregation": aggregation, "denominator": denominator}
        loss, clipfrac, expected = oracles.value_loss(**flat, counted=counted, segments=segments, **options)
        leaf = inputs["values"].detach().requires_grad_()
        theirs = eager.value_loss(**{**inputs, "values": leaf}, **options)
        theirs.backward()
        out, grad = run(inputs, **options, backend=backend)
        assert grad.dtype == dtype
        assert_near_truth(out.loss, loss, theirs, dtype=dtype)
        assert_near_truth(grad, expected, leaf.grad, dtype=dtype, gradient=True)
        assert_near_truth(out.metrics["clipfrac"], clipfrac, dtype=dtype)
        assert_same(out.metrics["value_loss"], out.loss)
        assert out.metrics["tokens"] == counted.sum()
        assert out.per_token is None


@each_backend("value_loss")
def test_the_batch_is_clipped_in_part(backend: str) -> None:
    inputs, _ = make("padded", torch.float32)
    assert 0.1 < run(inputs, clip=0.3, backend=backend)[0].metrics["clipfrac"] < 0.9


@each_backend("value_loss")
def test_nothing_is_clipped_within_the_clip(backend: str) -> None:
    """old + (v - old) differs from v by a rounding in every second token."""
    values, returns, old = 0.2 * torch.rand(3, 10_000) - 0.1
    values[0], returns[0], old[0] = -0.11647, -0.19274, -0.26535
    clipped, grad = run(
        {"values": values, "returns": returns, "mask": None, "old_values": old}, clip=0.2, backend=backend
    )
    plain, same_grad = run({"values": values, "returns": returns, "mask": None}, backend=backend)
    assert clipped.metrics["clipfrac"] == 0
    assert_same((clipped.loss, grad), (plain.loss, same_grad))


@each_backend("value_loss")
def test_no_clip_ignores_the_old_values(backend: str) -> None:
    inputs, _ = make("padded", torch.float32)
    with_old, grad = run(inputs, backend=backend)
    without, same_grad = run({**inputs, "old_values": None}, backend=backend)
    assert_same((with_old.loss, grad), (without.loss, same_grad))


@each_backend("value_loss")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up(backend: str, aggregation: str) -> None:
    inputs, _ = make("padded", torch.float32)
    options = {"clip": 0.3, "aggregation": aggregation, "backend": backend}
    whole, grad = run(inputs, **options)
    mask = inputs["mask"]
    count = mask.sum() if aggregation == "token-mean" else mask.any(1).sum()
    rows = [{k: x[b : b + 1] for k, x in inputs.items()} for b in range(B)]
    parts = [run(row, **options, denominator=count) for row in rows]
    torch.testing.assert_close(sum(out.loss for out, _ in parts), whole.loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), grad)


@each_backend("value_loss")
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (2, 2, 3)])
def test_free_shapes(backend: str, shape: tuple[int, ...]) -> None:
    values, returns = torch.randn(shape), torch.randn(shape)
    out, grad = run({"values": values, "returns": returns, "mask": None}, backend=backend)
    error = values - returns
    torch.testing.assert_close(out.loss, error.square().sum() / (2 * max(error.numel(), 1)))
    torch.testing.assert_close(grad, error / max(error.numel(), 1))


@each_backend("value_loss")
def test_the_gradient_scales_with_its_upstream(backend: str) -> None:
    inputs, _ = make("padded", torch.float32)
    _, grad = run(inputs, clip=0.3, backend=backend)
    leaf = inputs["values"].requires_grad_()
    (-4 * pf.value_loss(**{**inputs, "values": leaf}, clip=0.3, backend=backend).loss).backward()
    torch.testing.assert_close(leaf.grad, -4 * grad)


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: str, clip: float | None) -> None:
    inputs, _ = make(layout, torch.float64)

    def loss(values: Tensor) -> Tensor:
        options = {"clip": clip, "aggregation": "seq-mean-token-mean", "backend": "torch"}
        return pf.value_loss(**{**inputs, "values": values}, **options).loss

    assert torch.autograd.gradcheck(loss, inputs["values"].requires_grad_())
