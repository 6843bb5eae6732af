"""The interpreter computes what a GPU computes, after the repairs of ``tests/interpreter.py``."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests import interpreter


@triton.jit
def cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out_ptr + lane, tl.load(x_ptr + lane).to(out_ptr.dtype.element_ty))


@triton.jit
def double_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    x = tl.load(x_ptr + lane)
    tl.store(out_ptr + lane, x + x)


@triton.jit
def fma_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), tl.fma(x, x, -1.0))


@triton.jit
def maximum_kernel(x_ptr, out_ptr, PROPAGATE: tl.constexpr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    if PROPAGATE:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        x = tl.maximum(x, 0.0)
    tl.store(out_ptr + tl.arange(0, SIZE), x)


@triton.jit
def first_then_second(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def scan_kernel(a_ptr, b_ptr, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    a, b = tl.associative_scan((tl.load(a_ptr + lane), tl.load(b_ptr + lane)), 0, first_then_second)
    tl.store(a_ptr + lane, a)
    tl.store(b_ptr + lane, b)


@triton.jit
def overflow_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.arange(0, SIZE), tl.exp2(x * x) * 0.0)
    tl.store(out_ptr, tl.max(x / x, 0))


@triton.jit
def count_kernel(out_ptr, first, last, STEP: tl.constexpr):
    count = 0
    for _ in range(first, last, STEP):
        count += 1
    tl.store(out_ptr, count)


def test_bfloat16_stores_round_to_nearest_even() -> None:
    x = torch.cat([torch.randn(1014) * 3, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, 3e38, 3.4e38])])
    x = torch.cat([x, torch.tensor([float("inf"), -float("inf"), float("nan"), 1e-40])])
    out = torch.empty(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, SIZE=1024)
    assert torch.equal(out.view(torch.int16)[:-2], x.bfloat16().view(torch.int16)[:-2])
    assert out[-2].isnan()
    assert torch.equal(out[-1], x[-1].bfloat16())


def test_bfloat16_arithmetic_is_refused() -> None:
    with pytest.raises(InterpreterError, match="no bfloat16 arithmetic: upcast first"):
        double_kernel[(1,)](torch.ones(2).bfloat16(), torch.ones(2).bfloat16(), SIZE=2)


def test_fma_rounds_once() -> None:
    x, out = torch.tensor([1 + 2**-13, 3.0]), torch.empty(2)
    fma_kernel[(1,)](x, out, SIZE=2)
    assert out.tolist() == [2**-12 + 2**-26, 8.0]


@pytest.mark.parametrize("propagate", [False, True])
def test_maximum_with_nan(propagate: bool) -> None:
    x, out = torch.tensor([float("nan"), -1.0]), torch.empty(2)
    maximum_kernel[(1,)](x, out, propagate, SIZE=2)
    assert out[1] == 0
    assert out[0].isnan() if propagate else out[0] == 0


def test_scan_of_an_operator_that_does_not_commute() -> None:
    a, b = torch.rand(2, 64)
    expected_a, expected_b, state = a.cumprod(0), torch.empty(64), torch.zeros(())
    for i in range(64):
        state = expected_b[i] = state * a[i] + b[i]
    scan_kernel[(1,)](a, b, SIZE=64)
    torch.testing.assert_close((a, b), (expected_a, expected_b))


def test_loops_over_run_time_bounds() -> None:
    out = torch.empty(1, dtype=torch.int32)
    count_kernel[(1,)](out, 3, 10, STEP=2)
    assert out.item() == 4


def test_infinities_and_nan_raise_no_warning() -> None:
    x, out = torch.zeros(2), torch.empty(2)
    overflow_kernel[(1,)](x + 1e30, out, SIZE=2)
    assert out[1].isnan()
    overflow_kernel[(1,)](x, out, SIZE=2)
    assert out[0].isnan()


@pytest.mark.parametrize(
    "element", [tl.float32, tl.int1, tl.pointer_type(tl.bfloat16), tl.pointer_type(tl.int8, 1, True)]
)
def test_types_and_tensors_that_share_their_attributes_have_those_of_triton(element: tl.dtype) -> None:
    for shape in ([4], [4, 1], [tl.constexpr(2), 2]):
        ours, again, plain = *(tl.block_type(element, shape) for _ in range(2)), object.__new__(tl.block_type)
        interpreter._block_type_init(plain, element, shape)
        assert vars(ours) == vars(again) == vars(plain)
        assert [size.value for size in tl.tensor(None, again).shape] == plain.shape.values
        assert tl.tensor(None, again).numel.value == 4
        assert tl.tensor(None, again).dtype == element
    assert tl.tensor(None, element).numel.value == 1
    assert len(tl.tensor(None, element).shape) == 0
