"""The vector exp2, exp, exp(x) - 1 - x and log of each instruction set, in units in the last place."""

import math

import pytest
import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension
from tests.ops.native.isas import each_isa, using

DENSE = 1 << 18


def apply(isa: str, name: str, x: Tensor) -> Tensor:
    """The function ``name`` of the extension, elementwise."""
    y = torch.empty_like(x)
    with using(isa):
        extension.elementary(name, x.data_ptr(), y.data_ptr(), x.numel())
    return y


def ulps(ours: Tensor, truth: Tensor) -> float:
    """The largest error in units in the last place of the float32 nearest to the truth."""
    nearest = truth.float()
    spacing = torch.nextafter(nearest.abs(), torch.tensor(math.inf)) - nearest.abs()
    return ((ours.double() - truth) / spacing.double()).abs().max().item()


@each_isa
def test_exp2(isa: str) -> None:
    x = torch.cat([torch.linspace(-126, 127, DENSE), torch.linspace(-1, 1, DENSE), torch.arange(-126.0, 128.0)])
    assert ulps(apply(isa, "exp2", x), x.double().exp2()) < 2


@each_isa
def test_exp2_is_exact_where_the_softmax_relies_on_it(isa: str) -> None:
    x = torch.tensor([0.0, -0.0, -127.0, -128.0, -1e30, -math.inf, math.nan])
    assert apply(isa, "exp2", x)[:-1].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert apply(isa, "exp2", x)[-1].isnan()


@each_isa
def test_exp2_never_falls(isa: str) -> None:
    y = apply(isa, "exp2", torch.linspace(-8, 0, DENSE))
    assert (y.diff() >= -(2**-24)).all()


@each_isa
@pytest.mark.parametrize("bound", [1e-3, 1.0, 20.0])
def test_exp(isa: str, bound: float) -> None:
    x = torch.linspace(-bound, bound, DENSE + 1)
    assert ulps(apply(isa, "exp", x), x.double().exp()) < 1.5


@each_isa
@pytest.mark.parametrize("bound", [1e-6, 1e-2, 1.5, 20.0])
def test_exp_excess_keeps_its_digits_near_zero(isa: str, bound: float) -> None:
    x = torch.linspace(-bound, bound, DENSE)
    x = x[x.abs() > bound / 20]  # nearer to 0 the float64 difference has lost its digits
    assert ulps(apply(isa, "exp_excess", x), x.double().expm1() - x.double()) < 4


@each_isa
def test_log(isa: str) -> None:
    x = torch.cat([torch.linspace(1, 3, DENSE), torch.logspace(-30, 30, DENSE), torch.linspace(0.7, 1, DENSE)[:-1]])
    assert ulps(apply(isa, "log", x), x.double().log()) < 2
    assert (apply(isa, "log", torch.linspace(1, 1e6, DENSE)) >= 0).all()


@each_isa
def test_special_values(isa: str) -> None:
    x = torch.tensor([1.0, math.nan])
    assert apply(isa, "log", x)[0] == 0
    assert apply(isa, "exp", torch.zeros(1)) == 1
    assert apply(isa, "exp_excess", torch.zeros(1)) == 0
    assert all(apply(isa, name, x)[1].isnan() for name in ("exp", "exp_excess", "log"))
