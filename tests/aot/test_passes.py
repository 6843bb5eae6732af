"""One pass over the logits, read off the kernels: their loads and stores, and what the launchers allocate."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast.ops._backends.triton import sample_tokens, token_stats, token_stats_backward
from ppo_fast.ops._core.inputs import RowGrads, RowInputs, SampleInputs
from ppo_fast.ops._core.results import RowStats
from tests.aot.cases import rows
from tests.aot.offline import SM90, compiling

V = 128_256
# A tile of logits: 256 lanes of 8 bfloat16, backward of one row; with a reference forward 512.
TILE = r"tensor<(256|512|1x256)x8x!tt\.ptr<bf16>"
ANY_TILE = r"tensor<(256|512|1x256)x8x(!tt\.ptr<)?\w+>"


class _Allocations(TorchDispatchMode):
    """The number of elements of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "empty" in str(func):
            self.sizes.append(result.numel())
        return result


def _accesses(kernel: Any, access: str) -> list[str]:
    """The lines of the kernel's TTIR that load or store a tile of any dtype."""
    return [line for line in kernel.asm["ttir"].splitlines() if f"tt.{access} " in line and re.search(ANY_TILE, line)]


def _loop(kernel: Any) -> str:
    """The text of the kernel's only loop."""
    ttir = kernel.asm["ttir"]
    assert ttir.count("scf.for") == 1
    loop = re.search(r"\n( *)[^\n]*scf\.for .*?\n\1\}", ttir, re.DOTALL)
    assert loop is not None
    return loop.group()


@pytest.mark.parametrize(("entropy", "reference"), [(False, False), (True, False), (True, True)])
def test_forward_reads_each_logit_once(entropy: bool, reference: bool) -> None:
    logits, targets = torch.empty(1, 2, V, dtype=torch.bfloat16), rows(torch.int64)
    with compiling(SM90) as kernels, _Allocations() as made:
        token_stats.token_stats(RowInputs(logits, targets, logits if reference else None, None, 1.0), entropy)
    segment, merge = kernels
    loads = _accesses(segment, "load")
    assert len(loads) == 1 + reference
    assert all(re.search(TILE, line) and line in _loop(segment) for line in loads)
    assert not _accesses(segment, "store")
    assert not _accesses(merge, "load")
    assert max(made.sizes) <= 6 * 2 * 8  # six fields of two rows of eight segments or fewer


def test_sampling_reads_each_logit_once_and_keeps_nothing_of_their_size() -> None:
    logits, keys = torch.empty(1, 2, V, dtype=torch.bfloat16), torch.empty(1, 2, 3, dtype=torch.int64)
    with compiling(SM90) as kernels, _Allocations() as made:
        sample_tokens.sample_tokens(SampleInputs(logits, keys, 1.0, None, None))
    segment, merge = kernels
    tile = r"tt\.load .*tensor<256x4x!tt\.ptr<bf16>"
    assert len(re.findall(tile, segment.asm["ttir"])) == len(re.findall(tile, _loop(segment))) == 1
    assert not re.findall(tile, merge.asm["ttir"])
    assert max(made.sizes) <= 3 * 2 * 8  # three fields of two rows of eight segments


@pytest.mark.parametrize("reference", [False, True])
def test_backward_reads_and_writes_each_logit_once(reference: bool) -> None:
    logits, targets, g, lse = torch.empty(1, 2, V, dtype=torch.bfloat16), rows(torch.int64), rows(), rows(torch.float64)
    g_kl: Tensor | None = g if reference else None
    with compiling(SM90) as kernels, _Allocations() as made:
        inputs = (RowGrads(g, g, g_kl), RowInputs(logits, targets, logits, None, 1.0), RowStats(g, g, g, lse, lse))
        token_stats_backward.token_stats_backward(*inputs)
        token_stats_backward.token_stats_backward(*inputs, out=logits)
    for kernel in kernels:
        assert len(_accesses(kernel, "load")) == 1 + reference
        assert len(_accesses(kernel, "store")) == 1
        assert "scf.for" not in kernel.asm["ttir"]
    assert made.sizes == [2 * V]
