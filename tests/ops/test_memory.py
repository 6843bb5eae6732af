"""Peak memory of the policy loss, forward and backward, in buffers of the size of the logits."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ppo_fast as pf
from tests.helpers import each_backend

N, V = 16, 4096
LOGITS_BYTES = N * V * 4
# The torch backend holds log-probabilities, probabilities and products of them; a kernel holds the gradient.
BUFFERS = {"torch": 6.0, "triton": 1.0, "native": 1.0}
PER_ROW = 0.05


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that tensors allocated during the call held at one time."""
    gc.collect()  # garbage that is freed during the call would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak


def forward_and_backward(logits: Tensor, backend: str, inplace: bool) -> Tensor:
    """The gradient of the logits."""
    out = pf.policy_loss(
        logits,
        torch.zeros(N, dtype=torch.long),
        torch.zeros(N),
        torch.ones(N),
        None,
        config=pf.PolicyLossConfig(ent_coef=0.1),
        inplace=inplace,
        backend=backend,
    )
    return torch.autograd.grad(out.loss, logits)[0]


def test_the_measure_sees_what_is_held_at_one_time() -> None:
    assert LOGITS_BYTES <= peak_bytes(lambda: torch.zeros(N, V)) < 1.1 * LOGITS_BYTES
    assert 2 * LOGITS_BYTES <= peak_bytes(lambda: torch.zeros(N, V) + 1) < 2.1 * LOGITS_BYTES


@each_backend("policy_loss")
@pytest.mark.parametrize("inplace", [False, True])
def test_policy_loss(backend: str, inplace: bool) -> None:
    logits = torch.randn(N, V, requires_grad=True) * 1.0
    buffers = BUFFERS[backend] - (inplace and backend != "torch")
    assert peak_bytes(lambda: forward_and_backward(logits, backend, inplace)) <= (buffers + PER_ROW) * LOGITS_BYTES


@each_backend("policy_loss")
def test_a_view_of_the_logits_is_not_copied(backend: str) -> None:
    full = torch.randn(1, N + 2, V, requires_grad=True) * 1.0
    view = full[0, 1:-1]
    whole = torch.randn(N, V, requires_grad=True) * 1.0
    on_view, on_whole = (peak_bytes(lambda x=x: forward_and_backward(x, backend, False)) for x in (view, whole))
    assert on_view <= on_whole + PER_ROW * LOGITS_BYTES
