"""Beyond the first derivative in reverse mode: functions of plain torch have the right one, kernels refuse it."""

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import ppo_fast as pf
from tests.helpers import each_backend, raises_exactly
from tests.ops.examples import EXAMPLES, each_example, fresh_inputs, run, upstream

# Raised by torch itself at the first forward-mode derivative.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

DIFFERENTIABLE = [name for name, example in EXAMPLES.items() if example.leaf]
KERNELS = [name for name in DIFFERENTIABLE if EXAMPLES[name].op]
PLAIN = [name for name in DIFFERENTIABLE if not EXAMPLES[name].op]
TANGENT = "{op}: expected {leaf} to be differentiated in reverse mode, got a forward-mode tangent"
TWICE = "{op}: expected one differentiation, got create_graph=True: the op has no second derivative"


@each_example(*KERNELS)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_second_derivative_is_refused(name: str, backend: str, scale: float) -> None:
    op, leaf = EXAMPLES[name].op, fresh_inputs(name)[EXAMPLES[name].leaf]
    loss = scale * upstream(run(name, backend, {**fresh_inputs(name), EXAMPLES[name].leaf: leaf}))
    with raises_exactly(TWICE.format(op=op), RuntimeError):
        torch.autograd.grad(loss, leaf, create_graph=True)


@each_backend("policy_loss")
def test_a_second_derivative_is_refused_in_place(backend: str) -> None:
    inputs = fresh_inputs("policy_loss")
    logits = inputs.pop("logits") * 1.0
    loss = pf.policy_loss(logits, **inputs, inplace=True, backend=backend).loss
    with raises_exactly(TWICE.format(op="policy_loss"), RuntimeError):
        loss.backward(create_graph=True)


@each_example(*KERNELS)
def test_forward_mode_is_refused(name: str, backend: str) -> None:
    example = EXAMPLES[name]
    leaf = example.inputs[example.leaf].clone()
    message = TANGENT.format(op=example.op, leaf=example.leaf)
    with raises_exactly(message):
        torch.func.jvp(lambda x: run(name, backend, {**example.inputs, example.leaf: x}), (leaf,), (leaf,))
    for differentiable in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf.clone().requires_grad_(differentiable), leaf)
            with raises_exactly(message):
                run(name, backend, {**example.inputs, example.leaf: dual})


@each_backend("linear_policy_loss")
@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_token_stats"])
def test_forward_mode_is_refused_in_the_head(name: str, backend: str, leaf: str) -> None:
    inputs = fresh_inputs(name)
    with forward_ad.dual_level(), raises_exactly(TANGENT.format(op=name, leaf=leaf)):
        run(name, backend, inputs | {leaf: forward_ad.make_dual(inputs[leaf], inputs[leaf])})


@each_backend("value_loss")
def test_forward_mode_around_constants_goes_on(backend: str) -> None:
    inputs = fresh_inputs("value_loss")
    with forward_ad.dual_level():
        assert run("value_loss", backend, inputs)["value_loss.loss"].isfinite()


@each_example(*PLAIN)
def test_plain_functions_have_all_derivatives(name: str, backend: str) -> None:
    """Along a direction: forward mode and the second derivative against central differences in float64."""
    example, step = EXAMPLES[name], 1e-5
    inputs = {k: x.double() if x.is_floating_point() else x for k, x in example.inputs.items()}
    point = inputs[example.leaf]
    direction = torch.randn_like(point)

    def loss(x: Tensor) -> Tensor:
        results = run(name, backend, {**inputs, example.leaf: x})
        value = next(iter(results.values()))
        return (value * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)).sum().square()

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    _, tangent = torch.func.jvp(loss, (point,), (direction,))
    torch.testing.assert_close(tangent, (slope(point) * direction).sum())
    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad((gradient * direction).sum(), leaf)
    expected = (slope(point + step * direction) - slope(point - step * direction)) / (2 * step)
    torch.testing.assert_close(second, expected, rtol=1e-5, atol=1e-6)
