"""The guard that keeps one test from spoiling the others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers import PROCESS_WIDE, no_host_sync, process_wide_state_kept

CHANGES: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "default dtype": (torch.set_default_dtype, torch.float64),
    "grad mode": (torch.set_grad_enabled, False),
    "number of threads": (torch.set_num_threads, 3),
    "deterministic algorithms": (torch.use_deterministic_algorithms, True),
    "matmul precision": (torch.set_float32_matmul_precision, "high"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_process_wide_state_left_changed_is_an_error_and_is_restored(name: str) -> None:
    read, (change, value) = PROCESS_WIDE[name][0], CHANGES[name]
    before = read()
    with pytest.raises(AssertionError, match=f"^process-wide state left changed: {name}"), process_wide_state_kept():
        change(value)
    assert read() == before


@pytest.mark.gpu
def test_a_host_sync_raises_and_the_mode_does_not_stay() -> None:
    x = torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), no_host_sync():
        x.item()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert x.item() == 0
