"""What only the Triton kernels have: segments of a row that are merged, tiles, offsets, rows that are not read."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import ppo_fast as pf
from ppo_fast.ops._backends import reference
from ppo_fast.ops._backends.triton import sample_filters, token_stats, token_stats_backward, tuning
from ppo_fast.ops._core.inputs import RowGrads, RowInputs, SampleInputs
from ppo_fast.ops._core.results import RowStats
from tests.helpers import assert_near_truth, assert_same
from tests.ops.test_sample_tokens import kept_by_definition, keys_of

INF, NAN = math.inf, math.nan


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 16 words to a segment, so that 100 words are four segments, the last of them not full."""
    monkeypatch.setattr(tuning, "WHOLE", 0)
    for table in ("_FORWARD", "_FORWARD_WITH_REFERENCE", "_FORWARD_UNALIGNED", "_BACKWARD", "_BACKWARD_UNALIGNED"):
        monkeypatch.setattr(tuning, table, {(9, 0): tuning.Tile(16, 2, 1)})


def _stats(logits: Tensor, targets: Tensor, ref: Tensor | None, temperature: float = 1.0) -> RowStats:
    return token_stats.token_stats(RowInputs(logits, targets, ref, None, temperature), True)


def _gradient(
    logits: Tensor, targets: Tensor, ref: Tensor | None, upstream: Tensor, out: Tensor | None = None
) -> Tensor:
    g, g_entropy, g_kl = upstream
    grads, rows = RowGrads(g, g_entropy, None if ref is None else g_kl), RowInputs(logits, targets, ref, None, 1.0)
    return token_stats_backward.token_stats_backward(grads, rows, _stats(logits, targets, ref), out)


@pytest.mark.parametrize("V", [96, 100, 33, 32, 17, 1])
@pytest.mark.parametrize("offset", [0.0, 3e4, -3e4])
@pytest.mark.usefixtures("small_tiles")
def test_merged_segments_equal_the_whole_row(V: int, offset: float) -> None:
    logits, ref = torch.randn(2, 2, 2, V).mul(4).add(offset).unbind()
    targets = torch.randint(0, V, (2, 2))
    ours = _stats(logits, targets, ref, 0.7)
    truth = reference.token_stats(RowInputs(logits.double(), targets, ref.double(), None, 0.7), True)
    eager = reference.token_stats(RowInputs(logits, targets, ref, None, 0.7), True)
    for got, expected, float32 in zip(ours[:3], truth, eager, strict=False):
        assert_near_truth(got, expected, float32, dtype=torch.float32)
    assert (ours[3] - truth[3]).abs().max() <= 2e-7 * max(1.0, abs(offset) * 1e-3)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("V", [96, 100, 69])
def test_gradient_of_every_block(V: int) -> None:
    logits, ref = torch.randn(2, 2, 2, V).mul(4).add(3e4).unbind()
    targets, upstream = torch.randint(0, V, (2, 2)), torch.randn(3, 2, 2)
    ours = _gradient(logits, targets, ref, upstream)
    rows = RowInputs(logits.double(), targets, ref.double(), None, 1.0)
    stats = reference.token_stats(rows, True)
    truth = reference.token_stats_backward(RowGrads(*upstream.double()), rows, stats)
    assert_near_truth(ours, truth, dtype=torch.float32, gradient=True)


@pytest.mark.usefixtures("small_tiles")
def test_infinities_anywhere_in_the_row() -> None:
    V = 96
    logits, ref = torch.randn(2, 1, 6, V)
    targets = torch.full((1, 6), 95)
    logits[0, 0, :40] = -INF  # a whole segment, and half of the next
    logits[0, 1] = -INF
    logits[0, 2, 50] = NAN
    ref[0, 3, 7] = -INF  # possible only for pi
    logits[0, 4, 7] = ref[0, 4, 7] = -INF  # impossible for both
    logits[0, 5, 4:8], ref[0, 5, 7] = -800.0, -INF  # possible when its lane is read, 2^-1154 of the row's maximum
    logprobs, entropy, kl, _, _ = _stats(logits, targets, ref)
    truth = reference.token_stats(RowInputs(logits.double(), targets, ref.double(), None, 1.0), True)
    assert logprobs[0, 1:3].isnan().all()
    assert entropy[0, 1:3].isnan().all()
    assert kl[0, 1:3].isnan().all()
    assert kl[0, 3] == INF
    fine = [0, 4, 5]
    for got, expected in zip((logprobs, entropy, kl), truth, strict=False):
        assert_near_truth(got[0, fine], expected[0, fine], dtype=torch.float32)


@pytest.mark.usefixtures("small_tiles")
def test_the_reference_maximum_may_jump_further_than_float32_underflows() -> None:
    logits, ref = torch.randn(2, 1, 2, 96)
    ref[0, 0, :32] -= 1000.0
    ref[0, 1, 64:] -= 1000.0
    targets = torch.zeros(1, 2, dtype=torch.int64)
    truth = reference.token_stats(RowInputs(logits.double(), targets, ref.double(), None, 1.0), True)
    assert_near_truth(_stats(logits, targets, ref)[2], truth[2], dtype=torch.float32)


@pytest.mark.parametrize("V", [96, 100])
@pytest.mark.usefixtures("small_tiles")
def test_bits_of_a_row_do_not_depend_on_the_batch(V: int) -> None:
    logits, ref = torch.randn(2, 2, 2, V)
    targets, upstream = torch.randint(0, V, (2, 2)), torch.randn(3, 2, 2)
    one = (slice(1, 2), slice(1, 2))
    alone = [logits[one].clone(), targets[one], ref[one].clone()]
    assert_same(_stats(*alone), tuple(x[one] for x in _stats(logits, targets, ref)))
    gradient = _gradient(logits, targets, ref, upstream)
    assert_same(_gradient(*alone, upstream[(slice(None), *one)]), gradient[one])


@pytest.mark.parametrize("V", [5, 96, 100])
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(V: int) -> None:
    """Several rows of a small vocabulary are one tile: 41 of them are more than one and end within another."""
    logits, ref = torch.randn(2, 1, 41, V)
    targets, upstream = torch.randint(0, V, (1, 41)), torch.randn(3, 1, 41)
    size = tuning.whole_tile(logits, token_stats.aligned(logits, ref))
    assert size is not None
    assert 1 < size.rows < 41 or V == 5
    stats, gradient = _stats(logits, targets, ref), _gradient(logits, targets, ref, upstream)
    for row in (0, 17, 40):
        one = (slice(None), slice(row, row + 1))
        alone = [logits[one].clone(), targets[one], ref[one].clone()]
        assert_same(_stats(*alone), tuple(x[one] for x in stats))
        assert_same(_gradient(*alone, upstream[(slice(None), *one)]), gradient[one])
    rows = RowInputs(logits.double(), targets, ref.double(), None, 1.0)
    truth = reference.token_stats_backward(RowGrads(*upstream.double()), rows, reference.token_stats(rows, True))
    assert_near_truth(gradient, truth, dtype=torch.float32, gradient=True)


@pytest.mark.parametrize("V", [40, 5000])
def test_the_gradient_of_the_loss_multiplies_every_upstream_gradient(V: int) -> None:
    logits, ref = torch.randn(2, 1, 3, V)
    targets, upstream, scale = torch.randint(0, V, (1, 3)), torch.randn(3, 1, 3), torch.tensor(0.3)
    rows = RowInputs(logits, targets, ref, None, 1.0)
    stats, run = token_stats.token_stats(rows, True), token_stats_backward.token_stats_backward
    expected = run(RowGrads(*upstream).scaled(scale), rows, stats)
    assert_same(run(RowGrads(*upstream), rows, stats, scale=scale), expected)


def test_a_wide_vocabulary() -> None:
    V = 50_257
    logits = torch.randn(1, 2, V).bfloat16()
    targets = torch.tensor([[0, V - 1]])
    ours = _stats(logits, targets, None)
    truth = reference.token_stats(RowInputs(logits.double(), targets, None, None, 1.0), True)
    eager = reference.token_stats(RowInputs(logits, targets, None, None, 1.0), True)
    for got, expected, float32 in zip(ours[:2], truth, eager, strict=False):
        assert_near_truth(got, expected, float32, dtype=torch.float32)


def test_rows_without_an_upstream_gradient_are_not_read() -> None:
    logits = torch.randn(1, 3, 40)
    targets, upstream = torch.randint(0, 40, (1, 3)), torch.randn(3, 1, 3)
    upstream[:, :, 1] = 0.0
    expected = _gradient(logits, targets, logits * 2, upstream)
    assert (expected[0, 1] == 0).all()
    assert (expected[0, [0, 2]] != 0).all()
    stats = _stats(logits, targets, logits * 2)
    logits[0, 1] = NAN
    rows = RowInputs(logits, targets, logits * 2, None, 1.0)
    again = token_stats_backward.token_stats_backward(RowGrads(*upstream), rows, stats)
    assert_same(again, expected)


@pytest.mark.parametrize("V", [48, 50])
def test_in_place_equals_out_of_place(V: int) -> None:
    logits = torch.randn(2, 3, V).bfloat16()
    targets, upstream = torch.randint(0, V, (2, 3)), torch.randn(3, 2, 3)
    expected = _gradient(logits, targets, None, upstream)
    out = _gradient(logits, targets, None, upstream, out=logits)
    assert out is logits
    assert_same(logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.usefixtures("small_tiles")
def test_gradient_of_rows_anywhere(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal rows at any address have equal bits; accesses of 16 bytes lie on 16 bytes; nothing else is written."""
    wide: list[bool] = []
    for name in ("create_load", "create_store"):  # without a mask: the accesses of whole blocks [1, lanes, group]
        run = getattr(InterpreterBuilder, name)

        def access(self: InterpreterBuilder, ptr: Any, *rest: Any, run: Callable[..., Any] = run) -> Any:
            if ptr.data.ndim == 3:
                wide.append((ptr.data[..., 0] % 16 == 0).all())
            return run(self, ptr, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, access)
    n, V = 8, 69
    row, ref = torch.randn(2, 1, 1, V).mul(4).to(dtype)
    targets, upstream = torch.full((1, n), 66), torch.tensor([1.0, -2.0, 0.5])[:, None, None].repeat(1, 1, n)
    logits, refs = row.repeat(1, n, 1), ref.repeat(1, n, 1)
    gradient = _gradient(logits, targets, refs, upstream)
    assert_same(gradient, gradient[:, :1].expand_as(gradient))
    storage = torch.full((1, n, V + 6), NAN, dtype=dtype)
    out = storage[:, :, 3:-3]
    assert_same(_gradient(row.repeat(1, n + 1, 1)[:, 1:], targets, refs, upstream, out=out), gradient)
    assert storage.isnan().sum() == 6 * n
    assert all(wide)
    # Three blocks of a row are whole, or four; in the second call only their gradient need lie on 16 bytes.
    assert len(wide) >= 3 * n * (3 + 1)


@pytest.mark.parametrize("V", [32, 33])
def test_offsets_past_2_to_the_31(V: int) -> None:
    """Two rows 2^31 + 16 elements apart, in memory of which only the touched pages become real."""
    stride = (1 << 31) + 16
    logits = torch.empty(stride + V, dtype=torch.bfloat16).as_strided((1, 2, V), (stride, stride, 1))
    rows, targets, upstream = torch.randn(1, 2, V).bfloat16(), torch.tensor([[1, V - 1]]), torch.randn(3, 1, 2)
    logits.copy_(rows)
    assert_same(_stats(logits, targets, logits), _stats(rows, targets, rows))
    expected = _gradient(rows, targets, rows, upstream)
    assert_same(_gradient(logits, targets, logits, upstream, out=logits), expected)


def test_misaligned_targets_and_masks() -> None:
    logits, targets = torch.randn(8, 16), torch.randint(0, 16, (9,))
    mask = torch.rand(9) > 0.3
    ours = pf.token_logprobs(logits, targets[1:], mask=mask[1:], backend="triton")
    assert_same(ours, pf.token_logprobs(logits, targets[1:].clone(), mask=mask[1:].clone(), backend="triton"))


def test_a_view_with_rows_off_16_bytes_is_read_in_place() -> None:
    storage = torch.randn(2, 6, 35)
    view = storage[:, 2:-1, 1:33]
    assert not token_stats.aligned(view)
    assert token_stats.aligned(view.contiguous())
    targets = torch.randint(0, 32, (2, 3))
    ours, contiguous = _stats(view, targets, None), _stats(view.contiguous(), targets, None)
    for got, expected in zip(ours[:2], contiguous, strict=False):
        assert_near_truth(got, expected.double(), dtype=torch.float32)


@pytest.mark.parametrize(("top_k", "top_p"), [(100, None), (None, 0.9), (60, 0.8)])
def test_filters_by_several_programs_a_row(
    top_k: int | None, top_p: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of five segments, the last of them not full: the smallest logit is that of the definition."""
    monkeypatch.setattr(tuning, "_FILTER", tuning.Tile(32, 2, 1))
    logits = torch.randn(1, 2, 270).bfloat16()
    logits[..., 101:139] = logits[..., 101:102]  # equal logits on both sides of a border, kept or dropped together
    inputs = SampleInputs(logits, keys_of(2)[None], 0.9, top_k, top_p)
    smallest = sample_filters.smallest_kept(inputs, False)
    assert smallest is not None
    kept = [logits[0, row, kept_by_definition(logits[0, row], 0.9, top_k, top_p)] for row in range(2)]
    assert smallest.tolist() == [words.min().item() for words in kept]
