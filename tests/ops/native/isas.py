"""What the tests of the native row kernels share: the instruction sets of this machine, and inputs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension

ISAS = extension.isas()
# Around the vector widths 4, 8 and 16, the end of the narrow kernel at 256, and the blocks of 1024 of the wide one.
VOCABULARIES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 1023, 1024, 1025, 3000)
DTYPES = (torch.float32, torch.bfloat16)

each_isa = pytest.mark.parametrize("isa", ISAS)
each_vocabulary = pytest.mark.parametrize("vocab", VOCABULARIES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Runs the kernels of one instruction set."""
    before = extension.isa()
    extension.set_isa(isa)
    try:
        yield
    finally:
        extension.set_isa(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def logits_of(rows: int, vocab: int, dtype: torch.dtype = torch.float32, *, banned: bool = False) -> Tensor:
    """[rows, vocab] logits; ``banned`` sets every third word but the first to -inf."""
    logits = torch.randn(rows, vocab) * 4
    if banned:
        logits[:, 2::3] = -torch.inf
    return logits.to(dtype)
