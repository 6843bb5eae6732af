"""What the tests share: the tolerance rule, exact error messages, and which backends this process tests."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from ppo_fast.ops._core import registry
from ppo_fast.ops._core.checks import accumulation_dtype

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def backends_under_test(op: str) -> list[str]:
    """The backends of ``op`` that this process tests: the interpreted Triton alone, or every other one that works."""
    wanted = ("triton",) if INTERPRETED else ("torch", "native")
    status = ppo_fast.backends()[op]
    return [backend for backend in wanted if status.get(backend) == "ok"]


def cases_under_test(op: str, dtypes: Sequence[torch.dtype] = DTYPES) -> list[tuple[str, torch.dtype]]:
    """Each tested backend of ``op`` with each of ``dtypes`` that it takes."""
    entries = registry._entries(op)
    return [(b, d) for b in backends_under_test(op) for d in dtypes if d in entries[b].dtypes]


def each_backend(op: str) -> pytest.MarkDecorator:
    """Parametrize ``backend`` over the tested backends of ``op``."""
    return pytest.mark.parametrize("backend", backends_under_test(op))


def each_case(op: str, dtypes: Sequence[torch.dtype] = DTYPES) -> pytest.MarkDecorator:
    """Parametrize ``backend, dtype``."""
    cases = cases_under_test(op, dtypes)
    return pytest.mark.parametrize(("backend", "dtype"), cases, ids=[f"{b}-{str(d)[6:]}" for b, d in cases])


def ulp(dtype: torch.dtype) -> float:
    """The spacing of the accumulation dtype above 1."""
    return torch.finfo(accumulation_dtype(dtype)).eps


def assert_near_truth(
    ours: Tensor, truth: Any, eager: Tensor | None = None, *, dtype: torch.dtype, gradient: bool = False
) -> None:
    """max|ours - truth| <= 2*max|eager - truth| + 32 ulp * S, and infinities in the same places.

    S = max(1, max|truth|) for values and max|truth| for gradients; ulp is that of the accumulation dtype of ``dtype``.
    """
    expected = torch.as_tensor(truth, dtype=torch.float64).reshape(ours.shape)
    got, finite = ours.detach().double(), expected.isfinite()
    assert torch.equal(got[~finite], expected[~finite])
    if not finite.any():
        return
    scale = expected[finite].abs().max().item()
    allowed = 32 * ulp(dtype) * (scale if gradient else max(1.0, scale))
    if eager is not None:
        allowed += 2 * (eager.detach().double().reshape(ours.shape) - expected)[finite].abs().max().item()
    error = (got - expected)[finite].abs().max().item()
    assert error <= allowed, f"error {error:.3e} is above {allowed:.3e} (scale {scale:.3e})"


def assert_same(ours: Any, theirs: Any) -> None:
    """Bitwise the same tensors, in nested tuples and dicts; NaN equals NaN."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = tuple(ours.values()), tuple(theirs.values())
    if isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    elif ours is None:
        assert theirs is None
    else:
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))


def _sync_debug_mode() -> int:
    return torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else 0


# What a test could leave changed for all later ones: how it is read and set.
PROCESS_WIDE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, torch.set_default_device),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "sync debug mode": (_sync_debug_mode, torch.cuda.set_sync_debug_mode),
}


@contextmanager
def process_wide_state_kept() -> Iterator[None]:
    """Fails when the block leaves process-wide state of torch changed, and restores it."""
    before = {name: read() for name, (read, _) in PROCESS_WIDE.items()}
    yield
    changed = [name for name, (read, _) in PROCESS_WIDE.items() if read() != before[name]]
    for name in changed:
        PROCESS_WIDE[name][1](before[name])
    assert not changed, f"process-wide state left changed: {', '.join(changed)}"


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Inside, an operation that waits for the CUDA device raises."""
    try:
        with warnings.catch_warnings():
            # Torch warns once, after it has set the mode, that it is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def raises_exactly(message: str, kind: type[Exception] = ValueError) -> AbstractContextManager[Any]:
    """The block raises ``kind`` with exactly this message."""
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def product_scratch(rows: int, width: int, words: int, dtype: torch.dtype) -> int:
    """Bytes that torch's product [rows, width] x [width, words] holds in addition to its result.

    A CPU without instructions for bfloat16 computes it in float32 and rounds the result.
    """
    from tests.ops.test_memory import peak_bytes

    out = torch.empty(rows, words, dtype=dtype)
    a, b = torch.zeros(rows, width, dtype=dtype), torch.zeros(width, words, dtype=dtype)
    return peak_bytes(lambda: torch.mm(a, b, out=out))
