"""Every kernel variant that ships compiles for every architecture, keeps its values in registers and fits."""

import re
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget

from tests.aot.cases import CASES
from tests.aot.offline import GFX942, SHARED_MEMORY, SM80, SM90, SM100, compiling, resources


def _compiled(case: str, target: GPUTarget) -> list[Any]:
    with compiling(target) as kernels:
        CASES[case]()
    assert kernels
    return list({id(kernel): kernel for kernel in kernels}.values())


@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("case", CASES)
def test_no_spills_and_room_for_two_programs(case: str, target: GPUTarget) -> None:
    for kernel in _compiled(case, target):
        used, threads = resources(kernel), 32 * kernel.metadata.num_warps
        assert used["STACK"] == 0, kernel.name
        # A multiprocessor has 65,536 registers.
        assert used["REG"] * threads * 2 <= 65_536, kernel.name
        assert kernel.metadata.shared * 2 <= SHARED_MEMORY[target.arch], kernel.name


@pytest.mark.parametrize("op", ["forward-llama3-torch.bfloat16", "backward-llama3-torch.bfloat16"])
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(op: str) -> None:
    for kernel in _compiled(op, SM90):
        if kernel.name != "rows_kernel":
            accesses = re.findall(r"\b(?:ld|st)\.global\S*", kernel.asm["ptx"])
            words = 32  # a thread
            wide = sum("v4.b32" in access for access in accesses)
            assert wide >= words // 8, kernel.name
            assert len(accesses) - wide < words, kernel.name


def test_kernels_compile_for_amd() -> None:
    for case in (
        "forward-llama3-torch.bfloat16",
        "backward-llama3-torch.bfloat16",
        "sample-gpt2",
        "policy-k3",
        "gae-torch.float32-32",
    ):
        for kernel in _compiled(case, GFX942):
            assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"]) == ["0", "0"], kernel.name
