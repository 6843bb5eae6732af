"""Check the common inputs of the linear ops, cast them as autocast would, and flatten them to rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.layout import as_bools, grid


class LinearCall(NamedTuple):
    """Common inputs of the linear ops, with N = B*T rows and V words."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D], dtype and device of hidden
    bias: Tensor | None  # [V]
    targets: Tensor  # [B, T], int32 or int64
    mask: Tensor | None  # [B, T], bool; None: every row counts
    ref_hidden: Tensor | None  # [N, D of the reference]; None: no reference
    ref_weight: Tensor | None  # [V, D of the reference]; None: that of the policy
    ref_bias: Tensor | None  # [V]
    softcap: float | None  # logits = softcap * tanh(x / softcap)
    temperature: float  # divides the logits
    chunk_size: int | None  # rows per chunk; None: by rule
    half_logits: bool  # logits in the dtype of hidden on a GPU too
    backend: str  # whose row kernels run


class _Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def _check_plain(op: str, name: str, value: object) -> None:
    """A tensor that matrix products take as it is: neither sharded nor quantized."""
    sharded = f": pass {name}.full_tensor(grad_placements=[Partial()]), or call the op in the sharded module's forward"
    checks.tensor(op, name, value, "" if name.endswith("hidden") else sharded)
    assert isinstance(value, Tensor)
    kind = type(value)
    # torch.compile cannot read the module of the class Parameter: only the dtype of its data is checked.
    package = "torch" if kind is torch.nn.Parameter else kind.__module__.split(".")[0]
    if value.dtype not in checks.FLOATS or package in ("torchao", "bitsandbytes"):
        raise ValueError(
            f"{op}: expected {name} to be an unquantized float32, bfloat16, float16 or float64 tensor, "
            f"got {kind.__name__} of {value.dtype}: pass it dequantized"
        )


def _check_alike(op: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise ValueError(f"{op}: expected {name} in the dtype of {like_name} ({like.dtype}), got {value.dtype}")
    checks.same_device(op, name, value, like_name, like)


def _autocast(x: Tensor) -> Tensor:
    """``x`` as ``torch.nn.functional.linear`` would take it: under autocast in its dtype, float64 excepted."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if on and x.dtype != torch.float64 else x


def _check_targets(op: str, targets: Tensor, hidden: Tensor) -> None:
    checks.tensor(op, "targets", targets)
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: expected targets to be int32 or int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: expected targets to match hidden {list(hidden.shape)} without the last dimension, "
            f"got {list(targets.shape)}"
        )
    checks.same_device(op, "targets", targets, "hidden", hidden)


def _head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> _Head:
    """Hidden states and the head above them, checked against one another and cast as autocast would.

    ``prefix`` is that of their names: "ref_" for the reference's.
    """
    hidden_name, weight_name, bias_name = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    for name, value in ((hidden_name, hidden), (weight_name, weight), (bias_name, bias)):
        if name != bias_name or value is not None:
            _check_plain(op, name, value)
        if not prefix:
            checks.reverse_mode(op, name, value)
    hidden, weight = _autocast(hidden), _autocast(weight)
    bias = None if bias is None else _autocast(bias)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{op}: expected {hidden_name} of shape [..., D] with D >= 1, got {list(hidden.shape)}")
    D = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != D:
        raise ValueError(
            f"{op}: expected {weight_name} of shape [V, {D}] to match {hidden_name} {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    _check_alike(op, weight_name, weight, hidden_name, hidden)
    if bias is not None:
        checks.same_shape(op, bias_name, bias, f"the words of {weight_name}", weight.shape[:1])
        _check_alike(op, bias_name, bias, hidden_name, hidden)
    return _Head(hidden, weight, bias)


def _reference(
    op: str, head: _Head, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> _Head | None:
    """The reference's hidden states and head, checked; without ref_weight the head is the policy's."""
    if ref_hidden is None:
        for name, value in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if value is not None:
                raise ValueError(f"{op}: expected ref_hidden with {name}, got None")
        return None
    if ref_weight is None:
        ref_weight, ref_bias = head.weight, head.bias if ref_bias is None else ref_bias
    ref = _head(op, ref_hidden, ref_weight, ref_bias, "ref_")
    if ref.hidden.shape[:-1] != head.hidden.shape[:-1]:
        raise ValueError(
            f"{op}: expected ref_hidden to match hidden {list(head.hidden.shape)} except in the last dimension, "
            f"got {list(ref.hidden.shape)}"
        )
    V = head.weight.shape[0]
    if ref.weight.shape[0] != V:
        raise ValueError(f"{op}: expected ref_weight of as many words as weight, {V}, got {ref.weight.shape[0]}")
    checks.same_device(op, "ref_hidden", ref.hidden, "hidden", head.hidden)
    return ref


def is_eager(call: LinearCall) -> bool:
    """Whether nobody traces the call: Tensor subclasses, such as those that trace, need the registered op."""
    return not torch.compiler.is_compiling() and type(call.hidden) is Tensor


def prepare(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    chunk_size: int | None,
    half_logits: bool,
    backend: str,
) -> LinearCall:
    """Check everything that both linear ops take, resolve the backend, flatten to rows."""
    head = _head(op, hidden, weight, bias)
    _check_targets(op, targets, head.hidden)
    shape = targets.shape
    ref = _reference(op, head, ref_hidden, ref_weight, ref_bias)
    checks.boolean(op, "mask", mask, "targets", targets, shape)
    checks.scale(op, "temperature", temperature)
    if softcap is not None:
        checks.scale(op, "softcap", softcap)
    integer = isinstance(chunk_size, int) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (integer and 1 <= chunk_size < 2**31):
        got = checks.shown(chunk_size)
        raise ValueError(f"{op}: expected chunk_size to be an integer in [1, {2**31 - 1}], got {got}")
    if not isinstance(half_logits, bool):
        raise ValueError(f"{op}: expected half_logits to be True or False, got {checks.shown(half_logits)}")
    backend = registry.resolve(op, backend, head.hidden.device, head.hidden.dtype)
    return LinearCall(
        head.hidden.reshape(-1, head.hidden.shape[-1]),
        head.weight,
        head.bias,
        targets.reshape(grid(shape)),
        as_bools(mask, shape),
        None if ref is None else ref.hidden.detach().reshape(-1, ref.hidden.shape[-1]),
        None if ref is None or ref_weight is None else ref.weight.detach(),
        None if ref is None or ref.bias is None else ref.bias.detach(),
        None if softcap is None else float(softcap),
        float(temperature),
        chunk_size,
        half_logits,
        backend,
    )
