"""The launchers' own kernels are all that runs: no kernel of torch prepares their inputs or finishes their results."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import ppo_fast as pf
from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._core import checks, registry

SHAPE = (1, 3)
# Ops that allocate, or look at memory that is there.
_NO_KERNEL = {"empty", "empty_like", "new_empty", "detach", "view", "_unsafe_view", "expand", "unbind", "alias"}
_NO_KERNEL |= {"slice", "select", "unsqueeze", "t", "permute", "transpose", "as_strided"}


class _Kernels(TorchDispatchMode):
    """The names of torch's ops that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in _NO_KERNEL:
            self.torch.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[_Kernels, list[str]]]:
    """(torch's kernels, ours) of what runs inside, as on a GPU: values are not checked."""
    launch, ours = GridExecutor.__call__, list[str]()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        ours.append(self.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", run)
    monkeypatch.setattr(registry, "runs_directly", lambda x: True)  # the mode that counts would be seen as a tracer
    for name in ("target_values", "denominator_value"):
        monkeypatch.setattr(checks, name, lambda *_: None)
    with _Kernels() as kernels:
        yield kernels, ours


def policy_loss(logits: Tensor, inputs: dict[str, Any]) -> Tensor:
    options = inputs.get("options", {})
    config = pf.PolicyLossConfig(ent_coef=0.01, kl_coef=0.05, penalty_coef=0.1, dual_clip=3.0, **options)
    return pf.policy_loss(
        logits,
        inputs["targets"],
        inputs["old"],
        inputs["advantages"],
        inputs["mask"],
        config=config,
        ref_logprobs=inputs["old"],
        denominator=inputs.get("denominator"),
        backend="triton",
    ).loss


def value_loss(values: Tensor, inputs: dict[str, Any]) -> Tensor:
    old, options = inputs["old"], {"denominator": inputs.get("denominator"), **inputs.get("options", {})}
    return pf.value_loss(values, old, inputs["mask"], old_values=old, clip=0.2, **options, backend="triton").loss


SEGMENTS = ["segment_kernel", "terms_kernel", "totals_kernel", "gradient_kernel"]
WHOLE = ["rows_kernel", "terms_kernel", "totals_kernel", "gradient_kernel"]
OF_SEQUENCES = ["rows_kernel", "sequence_terms_kernel", "totals_kernel", "gradient_kernel"]
VALUE = ["value_kernel", "totals_kernel", "scaled_kernel"]
GSPO = {"ratio": "sequence", "aggregation": "seq-mean-token-mean"}


@pytest.mark.parametrize(
    ("loss_of", "words", "denominator", "options", "launches"),
    [
        (policy_loss, (4100,), None, {}, SEGMENTS),
        (policy_loss, (20,), 7.0, {}, WHOLE),
        (policy_loss, (20,), torch.tensor(7.0), {}, WHOLE),
        (policy_loss, (4100,), None, GSPO, ["segment_kernel", *OF_SEQUENCES]),
        (policy_loss, (20,), torch.tensor(7.0), {"aggregation": "seq-mean-token-sum"}, OF_SEQUENCES),
        (value_loss, (), None, {}, VALUE),
        (value_loss, (), None, {"aggregation": "seq-mean-token-mean"}, ["value_sequences_kernel", *VALUE[1:]]),
    ],
    ids=["segments", "number", "tensor", "sequence ratio", "sequence sum", "value_loss", "values of sequences"],
)
def test_forward_and_backward(
    loss_of: Callable[..., Tensor],
    words: tuple[int, ...],
    denominator: float | Tensor | None,
    options: dict[str, str],
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leaf = torch.randn(*SHAPE, *words).requires_grad_()
    old, advantages = torch.randn(2, *SHAPE).unbind()
    inputs: Any = {"targets": torch.zeros(SHAPE, dtype=torch.int64), "old": old, "advantages": advantages}
    inputs |= {"mask": torch.tensor([[True, False, True]]), "denominator": denominator, "options": options}
    with counted(monkeypatch) as (kernels, ours):
        loss = loss_of(leaf, inputs)
        loss.backward()
    assert ours == launches
    assert kernels.torch == ["ones_like"]  # autograd's gradient of the loss
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0


def _head(tiles: int, trained: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """(torch's kernels, ours) of the linear head on so many tiles, forward and backward."""
    N = 2 * tiles
    hidden, weight = torch.randn(N, 8, requires_grad=True), torch.randn(40, 8, requires_grad=trained)
    rows = torch.randint(40, (N,)), torch.randn(N), torch.randn(N), None
    config = pf.PolicyLossConfig(ent_coef=0.1, kl_coef=0.1)
    with counted(monkeypatch) as (kernels, ours):
        out = pf.linear_policy_loss(
            hidden, weight, *rows, config=config, ref_logprobs=torch.zeros(N), chunk_size=2, backend="triton"
        )
        out.loss.backward()
    return kernels.torch, ours


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("segmented", [True, False])
def test_a_tile_of_the_linear_head(segmented: bool, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each further tile launches its matrix products and three kernels of ours."""
    if segmented:
        monkeypatch.setattr(tuning, "WHOLE", 0)
    with monkeypatch.context() as patch:
        torchs, ours = _head(2, trained, patch)
    with monkeypatch.context() as patch:
        more_torchs, more_ours = _head(4, trained, patch)
    rows = "segment_kernel" if segmented else "rows_kernel"
    assert Counter(more_ours) - Counter(ours) == {rows: 2, "terms_kernel": 2, "gradient_kernel": 2}
    products = {"mm": 4, "addmm": 2} if trained else {"mm": 4}
    assert Counter(more_torchs) - Counter(torchs) == products
