"""The Triton kernels: compiled on CUDA tensors, or interpreted on CPU tensors with TRITON_INTERPRET=1.

Importing this package imports no Triton: each launcher loads its module at its first call.
"""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

from ppo_fast.ops._core import registry

_DTYPES = (torch.float32, *registry.HALVES)


def _unusable() -> str | None:
    """Why no kernel can run on this machine; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not registry.interpreting() and torch.cuda.device_count() == 0:
        return "no CUDA device"
    return None


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def implementation(op: str, module: str) -> registry.Implementation:
    """The registry's entry of ``op``, whose launcher has that name in ``triton/<module>.py``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(_module(module), op)(*args, **kwargs)

    devices = ("cuda", "cpu") if registry.interpreting() else ("cuda",)
    return registry.Implementation(run, devices, _DTYPES, _DTYPES, _unusable())
