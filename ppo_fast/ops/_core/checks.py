"""Checks shared by the ops: one sentence each, ``op: expected ARG ..., got ...``.

Values (target range, contents of cu_seqlens) are checked on CPU tensors only: on a GPU the check would be a host sync.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)
# Float32 holds numbers between these, their reciprocals, and a hundred million times either.
SMALLEST, LARGEST = 1e-30, 1e30
# Temperature and softcap: float32 holds the square of the quotient of any two.
SMALLEST_SCALE, LARGEST_SCALE = 1e-9, 1e9


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of every reduction and output."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fits(value: object, dtypes: Sequence[torch.dtype], shape: torch.Size | None = None, like: Any = None) -> bool:
    """Whether ``value`` is a dense tensor of one of these dtypes, of this shape, on the device of the tensor ``like``.

    The checks below say what is wrong with another, at several times the cost of a small kernel's launch.
    """
    return (
        type(value) is Tensor
        and not value.is_nested
        and value.layout == torch.strided
        and value.dtype in dtypes
        and (shape is None or value.shape == shape)
        and (like is None or value.device == like.device)
    )


def one_of(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{op}: expected {name} to be one of {choices}, got {value!r}")


def tensor(op: str, name: str, value: object, if_sharded: str = "") -> None:
    """Raise unless ``value`` is a dense tensor of this process; ``if_sharded`` says what to do with another."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: expected {name} to be a tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise ValueError(f"{op}: expected {name} to be a whole tensor, got a DTensor{if_sharded}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise ValueError(f"{op}: expected {name} to be a dense tensor, got {kind}")


def floating(op: str, name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a tensor of one of the four supported floating dtypes."""
    tensor(op, name, value)
    if value.dtype not in FLOATS:
        raise ValueError(f"{op}: expected {name} to be float32, bfloat16, float16 or float64, got {value.dtype}")


def same_device(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless both tensors live on one device."""
    if value.device != like.device:
        raise ValueError(f"{op}: expected {name} on the device of {like_name} ({like.device}), got {value.device}")


def same_shape(
    op: str, name: str, value: Tensor, like_name: str, shape: torch.Size, *, broadcast: bool = False
) -> None:
    """Raise unless ``value`` has ``shape``; with ``broadcast`` its last dimension may be 1 ([B, 1] for [B, T])."""
    per_row = torch.Size([*shape[:-1], 1])
    if value.shape == shape or (broadcast and len(shape) > 1 and value.shape == per_row):
        return
    expected = f"{list(shape)} or {list(per_row)}" if broadcast and len(shape) > 1 else f"{list(shape)}"
    raise ValueError(f"{op}: expected {name} to match {like_name} {expected}, got {list(value.shape)}")


def per_token(
    op: str,
    name: str,
    value: Tensor | None,
    like_name: str,
    like: Tensor,
    shape: torch.Size,
    *,
    broadcast: bool = False,
) -> None:
    """A floating per-token tensor: dtype, shape, device. None passes."""
    if value is not None and not fits(value, FLOATS, shape, like):
        floating(op, name, value)
        same_shape(op, name, value, like_name, shape, broadcast=broadcast)
        same_device(op, name, value, like_name, like)


def boolean(op: str, name: str, value: Tensor | None, like_name: str, like: Tensor, shape: torch.Size) -> None:
    """A bool per-token tensor: dtype, shape, device. None passes."""
    if value is not None and not fits(value, (torch.bool,), shape, like):
        tensor(op, name, value)
        if value.dtype != torch.bool:
            raise ValueError(f"{op}: expected {name} to be bool, got {value.dtype}")
        same_shape(op, name, value, like_name, shape)
        same_device(op, name, value, like_name, like)


def logits(op: str, name: str, value: Tensor) -> None:
    """Logits: floating, at least one dimension, at least one word."""
    if not fits(value, FLOATS):
        floating(op, name, value)
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{op}: expected {name} of shape [..., V] with V >= 1, got {list(value.shape)}")


def targets(op: str, value: Tensor, logits: Tensor) -> None:
    """Targets: int32 or int64, the shape of the logits without V."""
    if fits(value, INTEGERS, logits.shape[:-1], logits):
        return
    tensor(op, "targets", value)
    if value.dtype not in INTEGERS:
        raise ValueError(f"{op}: expected targets to be int32 or int64, got {value.dtype}")
    if value.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: expected targets to match logits {list(logits.shape)} without the vocabulary, "
            f"got {list(value.shape)}"
        )
    same_device(op, "targets", value, "logits", logits)


def ref_logits(op: str, value: Tensor | None, logits_: Tensor) -> None:
    """Reference logits: floating, the shape and device of the logits. None passes."""
    if value is not None:
        logits(op, "ref_logits", value)
        same_shape(op, "ref_logits", value, "logits", logits_.shape)
        same_device(op, "ref_logits", value, "logits", logits_)


def number(
    op: str, name: str, value: object, low: float, high: float = LARGEST, *, above: bool = False, other: str = ""
) -> None:
    """Raise unless ``value`` is a number in [low, high], or (low, high] with ``above``; ``other``: what else may be."""
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not (low <= value <= high) or (above and value == low):  # type: ignore[operator]  # it is real
        bounds = f"{'(' if above else '['}{low:g}, {high:g}]"
        raise ValueError(f"{op}: expected {name} to be a number in {bounds}{other}, got {shown(value)}")


def shown(value: object) -> str:
    """As Python writes it, except integers of hundreds of digits, some of which it refuses to write."""
    huge = isinstance(value, int) and abs(value) > sys.float_info.max
    return "an integer beyond every float" if huge else repr(value)


def positive(op: str, name: str, value: object) -> None:
    """Raise unless ``value`` is a number above 0, and so is its reciprocal in float32."""
    number(op, name, value, SMALLEST)


def scale(op: str, name: str, value: object) -> None:
    """Raise unless ``value`` can divide logits: a temperature or a softcap."""
    number(op, name, value, SMALLEST_SCALE, LARGEST_SCALE)


def unit_interval(op: str, name: str, value: object) -> None:
    """Raise unless ``value`` is a number in [0, 1]."""
    number(op, name, value, 0.0, 1.0)


def sample_keys(op: str, value: Tensor, logits: Tensor) -> None:
    """Keys of a counter-based generator: int64, a seed, a row and a step for each row of the logits."""
    tensor(op, "keys", value)
    if value.dtype != torch.int64:
        raise ValueError(f"{op}: expected keys to be int64, got {value.dtype}")
    if value.shape != (*logits.shape[:-1], 3):
        raise ValueError(
            f"{op}: expected keys to be {[*logits.shape[:-1], 3]}: seed, row and step for each row of logits "
            f"{list(logits.shape)}, got {list(value.shape)}"
        )
    same_device(op, "keys", value, "logits", logits)


def step_values(op: str, keys: Tensor) -> None:
    """Every step lies in [0, 2^32). CPU tensors only."""
    if keys.device.type != "cpu" or keys.numel() == 0:
        return
    steps = keys[..., 2]
    bad = (steps < 0) | (steps >= 1 << 32)
    if bad.any():
        raise ValueError(f"{op}: expected steps, keys[..., 2], in [0, 2^32), got {steps[bad][0].item()}")


def top_k(op: str, value: object) -> None:
    """The number of words that top-k keeps: an integer of at least 1. None passes."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{op}: expected top_k to be an integer >= 1 or None, got {shown(value)}")


def top_p(op: str, value: object) -> None:
    """The mass that top-p keeps: a number in (0, 1]. None passes."""
    if value is not None:
        number(op, "top_p", value, 0.0, 1.0, above=True, other=" or None")


def cu_seqlens(op: str, value: Tensor | None, like_name: str, like: Tensor, shape: torch.Size) -> None:
    """Sequence offsets: int32 or int64 [S + 1], only for packed [N] tensors. None passes."""
    if value is None:
        return
    tensor(op, "cu_seqlens", value)
    if value.dtype not in (torch.int32, torch.int64) or value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(
            f"{op}: expected cu_seqlens to be int32 or int64 of shape [S + 1], "
            f"got {value.dtype} of shape {list(value.shape)}"
        )
    if len(shape) != 1:
        raise ValueError(f"{op}: expected packed {like_name} of shape [N] with cu_seqlens, got {list(shape)}")
    same_device(op, "cu_seqlens", value, like_name, like)


def denominator(op: str, value: object) -> None:
    """The outer count of a loss: a number above 0, or a 0-d tensor. None passes."""
    if isinstance(value, Tensor):
        tensor(op, "denominator", value)
        if value.dim() != 0 or value.dtype == torch.bool or value.is_complex():
            raise ValueError(
                f"{op}: expected denominator to be a number or a 0-d tensor of one, "
                f"got a tensor of shape {list(value.shape)} and dtype {value.dtype}"
            )
    elif value is not None:
        number(op, "denominator", value, SMALLEST, other=" or a 0-d tensor")


def denominator_value(op: str, value: Tensor | float | None, mask: Tensor | None, rows: int) -> None:
    """A denominator that came as a tensor: above 0, or 0 where nothing counts. CPU tensors only."""
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return
    got = value.item()
    nothing = rows == 0 or (mask is not None and not mask.any())
    if not (SMALLEST <= got <= LARGEST) and not (got == 0 and nothing):
        raise ValueError(f"{op}: expected denominator in [{SMALLEST:g}, {LARGEST:g}], got a tensor of {got}")


def coefficient_value(op: str, name: str, value: Tensor) -> None:
    """A coefficient that came as a tensor: not below 0, finite. CPU tensors only."""
    if value.is_cpu and not (0 <= value.item() <= LARGEST):
        raise ValueError(f"{op}: expected {name} in [0, {LARGEST:g}], got a tensor of {value.item()}")


def reverse_mode(op: str, name: str, value: Tensor | None) -> None:
    """Raise for a tangent of forward-mode differentiation, which a kernel would drop. None passes."""
    if forward_ad._current_level >= 0 and value is not None and forward_ad.unpack_dual(value).tangent is not None:
        raise ValueError(f"{op}: expected {name} to be differentiated in reverse mode, got a forward-mode tangent")


def first_derivative(op: str) -> None:
    """Raise in a backward pass that is to be differentiated again: kernels write constants."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op}: expected one differentiation, got create_graph=True: the op has no second derivative"
        )


def target_values(op: str, value: Tensor | None, mask: Tensor | None, vocab: int) -> None:
    """Every counted target lies in [0, V). CPU tensors only. None passes."""
    if value is None or not value.is_cpu or value.numel() == 0:
        return
    lowest, highest = value.aminmax()
    if lowest.item() >= 0 and highest.item() < vocab:
        return
    bad = (value < 0) | (value >= vocab)
    if mask is not None:
        bad &= mask
    if bad.any():
        got = value[bad][0].item()
        # The label that torch.nn.functional.cross_entropy and the collators of transformers ignore.
        hint = ": pass mask=targets != -100" if got == -100 else ""
        raise ValueError(f"{op}: expected targets in [0, {vocab}) where mask is True, got {got}{hint}")


def cu_seqlens_values(op: str, value: Tensor | None, rows: int) -> None:
    """cu_seqlens rises from 0 to N (empty sequences allowed). CPU tensors only."""
    if value is None or value.device.type != "cpu":
        return
    if value[0] != 0 or value[-1] != rows or (value[1:] < value[:-1]).any():
        raise ValueError(
            f"{op}: expected cu_seqlens to rise from 0 to {rows}, "
            f"got {value.tolist() if value.shape[0] <= 8 else [*value[:4].tolist(), '...', value[-1].item()]}"
        )
