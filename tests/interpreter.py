"""Repairs of Triton's interpreter, so that interpreted kernels compute what a GPU computes, and sooner.

They replace internals of Triton 3.6 and 3.7; ``tests/ops/triton/test_interpreter.py`` fails where one no longer works.
"""

import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_cast_impl, _binary_op, _launch = _Builder.cast_impl, _Builder.binary_op, interpreter.GridExecutor.__call__
_patch_tensor, _numpy_dtype = interpreter._patch_lang_tensor, interpreter._get_np_dtype
_block_type_init, _broadcast = tl.block_type.__init__, interpreter.interpreter_semantic.broadcast_impl_value
_patched: set[int] = set()
_numpy_dtypes: dict[str, Any] = {}
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_shapes: dict[tuple[int, ...], tuple[Any, Any]] = {}
_builtins: dict[Any, list[str]] = {}


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    """float32 -> bfloat16 rounds to nearest even; the interpreter truncates."""
    if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
        return _cast_impl(self, src, dst_type)
    bits = src.data.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    data = np.where(np.isnan(src.data), quiet_nan, rounded).astype(np.uint16)
    return interpreter.TensorHandle(data, dst_type.scalar)


def _binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    """bfloat16 is stored as its 16 bits: arithmetic on it would be arithmetic on those, so it is refused."""
    if lhs.dtype.scalar == tl.bfloat16 or rhs.dtype.scalar == tl.bfloat16:
        raise TypeError("the interpreter has no bfloat16 arithmetic: upcast first")
    return _binary_op(self, lhs, rhs, op)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x*y + z with the product unrounded: float64 holds the product of two float32."""
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _scan(self: Any, arguments: Any) -> list[Any]:
    """An inclusive scan by doubling, on whole arrays, as the threads of a GPU do it; the interpreter loops."""
    arrays = [np.moveaxis(x.handle.data, self.axis, 0) for x in arguments]
    position, step = np.arange(arrays[0].shape[0]), 1

    def tensors(values: list[Any]) -> list[Any]:
        return [self.to_tensor(a, x.dtype) for a, x in zip(values, arguments, strict=True)]

    while step < len(position):
        earlier = [a[np.maximum(position - step, 0)] for a in arrays]
        combined = self.combine_fn.fn(*tensors(earlier), *tensors(arrays))
        arrays = [np.concatenate([a[:step], c.handle.data[step:]]) for a, c in zip(arrays, combined, strict=True)]
        step *= 2
    return tensors([np.moveaxis(a, 0, self.axis) for a in arrays])


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``triton.language`` is patched once a launch for each calling module; at every call it takes half of the time."""
    if id(self.fn.__globals__) not in _patched:
        _patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _cached_numpy_dtype(dtype: Any) -> Any:
    """NumPy's dtype is looked up once for each of Triton's."""
    if dtype.name not in _numpy_dtypes:
        _numpy_dtypes[dtype.name] = _numpy_dtype(dtype)
    return _numpy_dtypes[dtype.name]


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """Equal block types share their attributes."""
    key = (element_ty.name, getattr(element_ty, "address_space", None), *map(int, shape))
    if key not in _block_types:
        _block_type_init(self, element_ty, shape)
        _block_types[key] = vars(self)
    vars(self).update(_block_types[key])


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """Tensors of one shape share it."""
    shape = tuple(type.shape.values) if type.is_block() else ()
    if shape not in _shapes:
        _shapes[shape] = tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shapes[shape]


def _broadcast_unequal(lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """Operands of one shape are left as they are."""
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast(lhs, rhs)


def _patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    """The names of a package's functions are listed once, before anything is patched; each launch listed them."""
    if package not in _builtins:
        _builtins[package] = [name for name in dir(package) if tl.core.is_builtin(getattr(package, name, None))]
    for name in _builtins[package]:
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


def _patch_loop_bounds(tensor: Any, scope: Any) -> None:
    """A run-time bound of a loop is an array of one element, which NumPy 2.4 no longer takes for an int."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _nothing_to_copy_back(self: Any, *_: Any) -> None:
    """CPU tensors were written in place; the interpreter copies each storage onto itself, untouched pages too."""


def _quiet_launch(self: Any, *args: Any, **kwargs: Any) -> None:
    """Overflow, 0 * inf and an all-NaN maximum give inf and NaN as on a GPU, without a warning from NumPy."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        _patched.clear()
        _launch(self, *args, **kwargs)


def repair() -> None:
    """Replace the faulty and the slow parts for the rest of the process."""
    _Builder.cast_impl = _cast
    _Builder.binary_op = _binary
    _Builder.create_fma = _fma
    # maxnum and minnum return the number where the other operand is NaN.
    _Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    _Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    interpreter.ScanOps.generic_scan = _scan
    interpreter._patch_lang_tensor = _patch_loop_bounds
    interpreter._patch_builtin = _patch_builtins
    interpreter._get_np_dtype = _cached_numpy_dtype
    tl.block_type.__init__, tl.tensor.__init__ = _init_block_type, _init_tensor
    interpreter.interpreter_semantic.broadcast_impl_value = _broadcast_unequal
    # An overflow of integers was computed at each operation, and nothing read it.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.GridExecutor._restore_args_dev = _nothing_to_copy_back
    interpreter.GridExecutor.__call__ = _quiet_launch
