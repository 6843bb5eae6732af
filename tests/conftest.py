"""One thread, fixed seeds, and in a TRITON_INTERPRET=1 process only the tests of the interpreted kernels."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.helpers import INTERPRETED, process_wide_state_kept

if INTERPRETED:
    from tests import interpreter

    interpreter.repair()

torch.set_num_threads(1)
EXAMPLES = 4 if INTERPRETED else 20
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=EXAMPLES)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _process_wide_state() -> Iterator[None]:
    with process_wide_state_kept():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under the interpreter run the tests with backend="triton" and those in tests/ops/triton; elsewhere run the rest.

    What is marked gpu is skipped without a CUDA device.
    """

    def interpreted(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        on_a_gpu = item.get_closest_marker("gpu") is not None
        return parameters.get("backend") == "triton" or (item.path.parent.name == "triton" and not on_a_gpu)

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip("needs a CUDA device"))
    config.hook.pytest_deselected(items=[item for item in items if interpreted(item) != INTERPRETED])
    items[:] = [item for item in items if interpreted(item) == INTERPRETED]
