"""A kernel is compiled once for a vocabulary and a dtype: not again when shapes, strides or scalars change."""

import pytest
import torch
from torch import Tensor

from ppo_fast.ops._backends.triton import gae, policy_loss, sample_tokens, token_stats, token_stats_backward, value_loss
from ppo_fast.ops._core.config import PolicyInputs
from ppo_fast.ops._core.inputs import GaeInputs, RowGrads, RowInputs, SampleInputs, ValueInputs
from ppo_fast.ops._core.results import RowStats
from tests.aot.offline import SM90, compiling

VOCABULARIES = {256: 2, 8192: 3}  # whole rows: one kernel forward and one backward; segments are merged by another
# Rows in odd numbers, in multiples of 16, a single one, and sequences further apart than 2^31 elements.
LAYOUTS = [(1, 1, None), (2, 3, None), (1, 16, None), (4, 40, None), (1, 3, (1 << 31) + 16)]


def _logits(B: int, T: int, V: int, stride: int | None) -> Tensor:
    logits = torch.zeros(B, T, V, dtype=torch.bfloat16)
    return logits if stride is None else logits.as_strided((B, T, V), (stride, V, 1))


def _names(kernels: list[object]) -> list[str]:
    return sorted(kernel.name for kernel in {id(k): k for k in kernels}.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("V", VOCABULARIES)
def test_logits_kernels(V: int) -> None:
    with compiling(SM90) as kernels:
        for temperature, (B, T, stride) in enumerate(LAYOUTS, 1):
            logits, x = _logits(B, T, V, stride), torch.zeros(B, T)
            targets, lse = torch.zeros(B, T, dtype=torch.int64), x.double()
            inputs = RowInputs(logits, targets, logits, None, temperature / 2)
            token_stats.token_stats(inputs, True)
            token_stats_backward.token_stats_backward(RowGrads(x, x, x), inputs, RowStats(x, x, x, lse, lse))
    assert len(kernels) == VOCABULARIES[V] * len(LAYOUTS)
    assert _names(kernels) == ["gradient_kernel", "rows_kernel", "segment_kernel"][: VOCABULARIES[V]]


def test_policy_loss_of_segments_is_three_kernels() -> None:
    with compiling(SM90) as kernels:
        for i, (B, T, stride) in enumerate(LAYOUTS):
            x, targets = torch.zeros(B, T), torch.zeros(B, T, dtype=torch.int64)
            options = (0.1 * i, 0.1 * i, 1.0 + i, "token", "k3", "token-mean", "clip")
            policy = PolicyInputs(x, x, x, None, None, None, 0.1 * i, 0.01, 0.5, *options)
            policy_loss.policy_loss(RowInputs(_logits(B, T, 8192, stride), targets, None, x > 0, 1.0), policy)
    assert len(kernels) == 3 * len(LAYOUTS)
    assert _names(kernels) == ["segment_kernel", "terms_kernel", "totals_kernel"]


def test_per_token_kernels() -> None:
    shapes = [(1, 1), (2, 3), (3, 100), (64, 64)]  # one, two and sixteen programs
    with compiling(SM90) as kernels:
        for i, (B, T) in enumerate(shapes):
            x, none, coef = torch.zeros(B, T), torch.empty(0), torch.tensor(float(i))
            options = (0.1 * i, 0.1 * i, 1.0 + i, "token", "k3", "token-mean", "clip")
            policy = PolicyInputs(x, x, x, None, None, None, coef, coef, coef, *options)
            policy_loss.policy_loss_from_stats(RowStats(x, x, none, none, none), None, policy)
            value_loss.value_loss(ValueInputs(x, x, None, x, None, None, 0.1 * i, "token-mean"))
    assert len(kernels) == 4 * len(shapes)
    # The totals of the two losses differ only in their number of rows, and in which of them is a maximum.
    assert _names(kernels) == ["terms_kernel", "totals_kernel", "totals_kernel", "value_kernel"]


def test_gae_kernels() -> None:
    with compiling(SM90) as kernels:
        for i, (B, T, _) in enumerate(LAYOUTS):
            x = torch.zeros(B, T)
            gae.gae(GaeInputs(x, x, None, None, torch.zeros(B), None, 1.0 - 0.1 * i, 0.9, "carry"))
            gae.gae(GaeInputs(x.t().contiguous().t(), x, None, None, torch.zeros(B), None, 1.0, 0.9, "carry"))
    assert len(kernels) == 2 * len(LAYOUTS)
    # One kernel each for steps in groups of 16 bytes, neighboring steps, and steps that lie apart.
    assert _names(kernels) == ["gae_kernel"] * 3


def test_filters_of_sampling_are_a_fixed_number_of_launches() -> None:
    """Four bits of a bfloat16 a launch and the last of these, by top-k and by top-p, whose sums are one more."""
    with compiling(SM90) as kernels:
        for i, (B, T, stride) in enumerate(LAYOUTS):
            keys = torch.zeros(B, T, 3, dtype=torch.int64)
            inputs = SampleInputs(_logits(B, T, 32768, stride), keys, 1.0 + i, 1 + 15 * i, 0.5 + 0.1 * i)
            sample_tokens.sample_tokens(inputs)
    assert len(kernels) == (5 + 1 + 5 + 2) * len(LAYOUTS)
    names = ["measure_kernel"] * 4 + ["merge_kernel", "segment_kernel"] + ["smallest_kernel"] * 2 + ["sums_kernel"]
    assert _names(kernels) == sorted(names)
