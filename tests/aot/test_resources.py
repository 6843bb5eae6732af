"""Every kernel variant that ships compiles for every architecture, keeps its values in registers and fits."""

import pytest
from triton.backends.compiler import GPUTarget

from tests.aot.cases import CASES
from tests.aot.offline import GFX942, SHARED_MEMORY, SM80, SM90, SM100, compiling, resources


@pytest.mark.parametrize("target", [SM80, SM90, SM100], ids=["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("case", CASES)
def test_no_spills_and_enough_room(case: str, target: GPUTarget) -> None:
    with compiling(target) as kernels:
        CASES[case]()
    for kernel in {id(kernel): kernel for kernel in kernels}.values():
        used = resources(kernel)
        threads = 32 * kernel.metadata.num_warps
        assert used["STACK"] == 0, kernel.name
        # Two programs at least fit on a multiprocessor of 65,536 registers.
        assert used["REG"] * threads * 2 <= 65_536, kernel.name
        assert kernel.metadata.shared * 2 <= SHARED_MEMORY[target.arch], kernel.name
