"""Choose the implementation of an op. This is the only place that decides.

A backend asked for by name runs or raises. ``"auto"`` takes the first entry of ``_AUTO`` for the tensor's device
that is registered for the op, takes the dtype and is usable on this machine; :func:`backends` shows the choice.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

BACKENDS = ("torch", "triton", "native", "cuda")
_AUTO = {"cuda": ("cuda", "triton", "torch"), "cpu": ("native", "torch")}

_CPU = torch.device("cpu")

HALVES = (torch.bfloat16, torch.float16)
ALL_FLOATS = (torch.float32, torch.float64, *HALVES)


class Implementation(NamedTuple):
    """One backend of one op.

    Attributes:
        run: the launcher; it allocates and launches and checks nothing.
        devices: device types it takes; empty: every device.
        dtypes: input dtypes it takes when asked for by name.
        auto_dtypes: input dtypes for which ``"auto"`` may choose it.
        unusable: why it cannot run on this machine, or None.
        fuses_backward: the launcher of a loss takes ``out=`` and writes the gradient of the loss there. It also refuses
            counted targets outside the vocabulary, before it writes anything.
    """

    run: Callable[..., Any]
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ALL_FLOATS
    auto_dtypes: tuple[torch.dtype, ...] = ALL_FLOATS
    unusable: str | None = None
    fuses_backward: bool = False

    def takes(self, device: str, dtype: torch.dtype) -> bool:
        """Whether it can run on such tensors."""
        return self.unusable is None and (not self.devices or device in self.devices) and dtype in self.dtypes


_TABLE: dict[str, dict[str, Implementation]] = {}
# Public ops with a ``backend`` argument, and the op whose kernels each runs on.
_PUBLIC: dict[str, str] = {}


def register_public(op: str, kernels: str | None = None) -> None:
    """Enter a public op that runs on the kernels of its own name, or on those of ``kernels``."""
    _PUBLIC[op] = kernels or op


def register(op: str, backend: str, implementation: Implementation) -> None:
    """Enter an implementation; the op's own module does this once, at import."""
    _TABLE.setdefault(op, {})[backend] = implementation


def _entries(op: str) -> dict[str, Implementation]:
    return _TABLE[_PUBLIC[op]]


def entry(op: str, backend: str) -> Implementation:
    """The implementation of a backend that :func:`resolve` has returned."""
    return _TABLE[op][backend]


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Its launcher."""
    return _TABLE[op][backend].run


def _obstacle(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` on these tensors; None when it can."""
    entry = _entries(op).get(backend)
    if entry is None:
        return f"{op} has no {backend} implementation"
    if entry.unusable is not None:
        return entry.unusable
    if entry.devices and device.type not in entry.devices:
        return f"it takes {' or '.join(entry.devices)} tensors, not {device.type}"
    if dtype not in entry.dtypes:
        return f"it does not take {dtype}"
    return None


def resolve(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs ``op`` on tensors of this device and dtype.

    Raises:
        ValueError: an unknown backend, or a named one that cannot run; it never falls back.
    """
    if backend == "auto":
        entries, kind = _entries(op), "cpu" if device == _CPU else device.type  # five times as quick as its string
        for name in _AUTO.get(kind, ("torch",)):
            entry = entries.get(name)
            if entry is not None and entry.takes(kind, dtype) and dtype in entry.auto_dtypes:
                return name
        return "torch"
    if backend not in BACKENDS:
        choices = ", ".join(repr(b) for b in ("auto", *BACKENDS))
        raise ValueError(f"{op}: expected backend to be one of {choices}, got {backend!r}")
    obstacle = _obstacle(op, backend, device, dtype)
    if obstacle is not None:
        raise ValueError(f"{op}: expected a usable backend, got {backend!r}: {obstacle}")
    return backend


def runs_directly(x: Tensor) -> bool:
    """Whether a launcher may be called past the dispatcher, which takes up to 1 ms: eager, and nobody traces.

    The registered op runs under ``torch.compile``, dispatch modes (fake tensors among them), ``torch.func`` transforms,
    ``torch.jit.trace`` and for tensor subclasses.
    """
    return (
        type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backends() -> dict[str, dict[str, str]]:
    """Every op's backends on this machine: ``"ok"`` or the reason why not, and what ``"auto"`` takes for float32.

    Returns:
        ``{op: {backend: "ok" or reason, "auto": name}}``. "auto" is for CUDA tensors where a CUDA device is
        present, else for CPU tensors.

    Example:
        >>> backends()["gae"]["torch"]
        'ok'
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table: dict[str, dict[str, str]] = {}
    for op in _PUBLIC:
        entries = _entries(op)
        table[op] = {b: entries[b].unusable or "ok" for b in BACKENDS if b in entries}
        table[op]["auto"] = resolve(op, "auto", device, torch.float32)
    return table
