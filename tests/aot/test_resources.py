"""Every kernel variant that ships compiles for every architecture, keeps its values in registers and fits."""

import re
from collections.abc import Iterator
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


# On the other architectures one case of each family of kernels, the one that needs the most registers.
LARGEST = {
    "forward-gpt2-torch.bfloat16",
    "backward-llama3-torch.bfloat16",
    "small",
    "sample-llama3-filtered",
    "policy-full",
    "policy-sequences-cispo",
    "gae-torch.bfloat16-1000",
    "slots-7b",
    "adamw-torch.bfloat16",
}


def _quick(case: str, target: GPUTarget) -> bool:
    return target is SM90 or case in LARGEST


def _cases() -> Iterator[Any]:
    for target in (SM80, SM90, SM100):
        for case in CASES:
            marks = () if _quick(case, target) else pytest.mark.slow
            yield pytest.param(case, target, id=f"{case}-sm{target.arch}", marks=marks)


@pytest.mark.parametrize(("case", "target"), [*_cases()])
def test_no_spills_and_room_for_two_programs(case: str, target: GPUTarget) -> None:
    for kernel in _compiled(case, target):
        used, threads = resources(kernel), 32 * kernel.metadata.num_warps
        # Rows that are read word by word: ptxas keeps 8 bytes of some kernels on the stack, at 40 registers of 255.
        assert used["STACK"] <= (8 if case == "small" else 0), kernel.name
        # A multiprocessor has 65,536 registers.
        assert used["REG"] * threads * 2 <= 65_536, kernel.name
        assert kernel.metadata.shared * 2 <= SHARED_MEMORY[target.arch], kernel.name


@pytest.mark.parametrize("op", ["forward-llama3-torch.bfloat16", "backward-llama3-torch.bfloat16"])
def test_aligned_rows_are_read_and_written_16_bytes_at_a_time(op: str) -> None:
    for kernel in _compiled(op, SM90):
        if kernel.name != "rows_kernel":
            accesses = re.findall(r"\b(?:ld|st)\.global\S*", kernel.asm["ptx"])
            words = {"segment_kernel": 16, "gradient_kernel": 32}[kernel.name]  # a thread
            wide = sum("v4.b32" in access for access in accesses)
            assert wide >= words // 8, kernel.name
            assert len(accesses) - wide < words, kernel.name


@pytest.mark.parametrize(("dtype", "accesses"), [("bfloat16", 2), ("float32", 4)])
def test_whole_blocks_of_unaligned_rows_have_16_byte_accesses_in_the_backward_pass(dtype: str, accesses: int) -> None:
    """Of 16 words a thread, in the loads of the logits and of a reference and in the stores of the gradient."""
    loads = set()
    for kernel in _compiled(f"backward-gpt2-torch.{dtype}", SM90):
        ptx = kernel.asm["ptx"]
        assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == accesses
        loads.add(len(re.findall(r"ld\.global\.v4\.b32", ptx)))
    assert loads == {accesses, 2 * accesses}


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
