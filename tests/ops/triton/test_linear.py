"""What a tile of the linear head launches: its products, three kernels of ours, and none of torch's around them."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

import ppo_fast as pf
from ppo_fast.ops._backends.triton import tuning

PRODUCTS = ["mm", "addmm"]
# They launch nothing.
VIEWS = (
    "view",
    "slice",
    "unsqueeze",
    "t",
    "empty",
    "detach",
    "alias",
    "transpose",
    "as_strided",
    "select",
    "unbind",
    "permute",
)


class _Recorder(TorchDispatchMode):
    """The names of torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not name.startswith(("new_empty", "empty")) and name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _launches(tiles: int, monkeypatch: pytest.MonkeyPatch, *, trained: bool) -> tuple[list[str], list[str]]:
    """(torch's kernels, ours) of a batch of so many tiles, forward and backward."""
    N, ours, run = 2 * tiles, [], InterpretedFunction.run
    hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(40, 8, requires_grad=trained)
    rows = torch.randint(40, (N,)), torch.randn(N), torch.randn(N), None
    config = pf.PolicyLossConfig(ent_coef=0.1, kl_coef=0.1)

    def counted(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
        ours.append(self.fn.__name__)
        with _disable_current_modes():  # the interpreter's own work
            return run(self, *args, **kwargs)

    with monkeypatch.context() as patch, _Recorder() as recorder:
        patch.setattr(InterpretedFunction, "run", counted)
        out = pf.linear_policy_loss(
            hidden, weight, *rows, config=config, ref_logprobs=torch.zeros(N), chunk_size=2, backend="triton"
        )
        out.loss.backward()
    return recorder.names, ours


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
def test_a_tile_launches_its_products_and_three_kernels(
    monkeypatch: pytest.MonkeyPatch, segmented: bool, trained: bool
) -> None:
    if segmented:
        monkeypatch.setattr(tuning, "WHOLE", 0)
    (torchs, ours), (more_torchs, more_ours) = (_launches(n, monkeypatch, trained=trained) for n in (2, 4))
    tiles = 4 - 2
    assert len(more_ours) - len(ours) == 3 * tiles
    products = 3 if trained else 2
    assert sum(more_torchs.count(name) - torchs.count(name) for name in PRODUCTS) == products * tiles
    more = Counter(more_torchs) - Counter(torchs)
    assert more.total() == products * tiles, more
