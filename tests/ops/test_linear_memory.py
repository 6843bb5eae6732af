"""Peak memory of the linear ops in addition to their inputs and gradients, and the rule for the rows of a chunk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ppo_fast as pf
from ppo_fast.ops._core import head_buffers
from ppo_fast.ops._core.head_buffers import Buffers, Layout, NeedsGrad
from ppo_fast.ops._core.head_gradients import Gradients
from ppo_fast.ops._core.linear_inputs import LinearCall
from tests.helpers import each_backend, product_scratch
from tests.ops.test_memory import peak_bytes

D, V = 16, 4096
TRAINED, SCORING = NeedsGrad(True, True, True), NeedsGrad(False, False, False)
# Numbers per row in addition to D of them: the results, their inputs and temporaries.
PER_ROW = 100


def inputs(N: int, dtype: torch.dtype = torch.float32, width: int = D) -> dict[str, Tensor]:
    """Everything trained, every row counted."""
    return {
        "hidden": torch.randn(N, width).to(dtype).requires_grad_(),
        "weight": torch.randn(V, width).to(dtype).requires_grad_(),
        "targets": torch.randint(V, (N,)),
    }


def gradients(out: Any, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of the loss, or of the log-probabilities."""
    loss = out.loss if isinstance(out, pf.LossOutput) else out.logprobs.sum()
    return torch.autograd.grad(loss, (given["hidden"], given["weight"]))


def policy_loss(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Forward and backward with every term."""
    N = given["hidden"].shape[0]
    rows = {"old_logprobs": torch.full((N,), -8.0), "advantages": torch.ones(N), "mask": None}
    config = pf.PolicyLossConfig(ent_coef=0.1, kl_coef=0.1, kl_estimator="full" if "ref_hidden" in options else "k3")
    if "ref_hidden" not in options:
        options["ref_logprobs"] = rows["old_logprobs"]
    return gradients(pf.linear_policy_loss(**given, **rows, config=config, **options), given)


def token_stats(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Forward and backward of the log-probabilities."""
    return gradients(pf.linear_token_stats(**given, **options), given)


# Chunks of logits held at one time: one by the kernels, several by the torch backend, which keeps intermediates.
BUFFERS = {"native": 1, "torch": 9}
on_a_cpu = pytest.mark.parametrize("backend", [b for b in BUFFERS if pf.backends()["linear_policy_loss"][b] == "ok"])


def bound(N: int, chunk: int, backend: str, dtype: torch.dtype = torch.float32) -> int:
    """A chunk of float32 logits, the gradients in float32 and as handed out, O(N*D), scratch of torch's products."""
    numbers = BUFFERS[backend] * chunk * V + 2 * V * D + N * (3 * D + PER_ROW)
    return 4 * numbers + product_scratch(chunk, D, V, dtype)


CHUNKS = {1024: 512, 2047: 512, 2048: 256, 3072: 384, 4096: 512, 8192: 512}


@on_a_cpu
@pytest.mark.parametrize("op", [policy_loss, token_stats])
@pytest.mark.parametrize("N", [1024, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_does_not_grow_with_the_logits(
    backend: str, op: Callable[..., Any], N: int, dtype: torch.dtype
) -> None:
    op(inputs(8, dtype), backend=backend)
    given = inputs(N, dtype)
    assert peak_bytes(lambda: op(given, backend=backend)) <= bound(N, CHUNKS[N], backend, dtype)


@on_a_cpu
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"softcap": 5.0}, torch.float32),
        ({"ref_hidden": True}, torch.bfloat16),
        ({"softcap": 5.0, "ref_hidden": True}, torch.float32),
        ({"softcap": 5.0, "ref_hidden": True}, torch.bfloat16),
    ],
)
def test_buffers_for_softcap_and_reference_keep_within_the_same_memory(
    backend: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    N, reference = 2048, torch.randn(2048, D).to(dtype)

    def call(rows: int) -> Callable[[], tuple[Tensor, ...]]:
        given, more = inputs(rows, dtype), {"ref_hidden": reference[:rows]} if "ref_hidden" in options else {}
        return lambda: policy_loss(given, backend=backend, **{**options, **more})

    call(8)()
    assert peak_bytes(call(N)) <= bound(N, N // 8, backend, dtype)


@on_a_cpu
@pytest.mark.parametrize("op", [policy_loss, token_stats])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_gradient_exists_in_float32_and_as_handed_out_alone(
    backend: str, op: Callable[..., Any], dtype: torch.dtype
) -> None:
    """With few rows and a wide model nothing else counts; 1/8 of it is left for everything else."""
    width = 1024
    given = inputs(16, dtype, width)
    op(given, backend=backend)
    peak = peak_bytes(lambda: op(given, backend=backend))
    assert peak <= (4 + dtype.itemsize + 0.5) * V * width


@each_backend("linear_token_stats")
def test_nothing_is_kept_without_gradients(backend: str) -> None:
    given = inputs(64)
    kept: list[pf.TokenStats] = []
    with torch.no_grad():
        kept.append(pf.linear_token_stats(**given, backend=backend))
    assert all(x is None or x.untyped_storage().nbytes() == 64 * 4 for x in kept[0])


@pytest.mark.parametrize(("N", "chunk"), [*CHUNKS.items(), (1, 1), (255, 255), (0, 1), (300, 300)])
def test_the_rule_on_a_cpu(N: int, chunk: int) -> None:
    hidden, weight = torch.empty(N, D, device="meta"), torch.empty(V, D, device="meta")
    given = LinearCall(hidden, weight, None, hidden, None, None, None, None, None, 1.0, None, False, "torch")
    assert (
        head_buffers.chunk_rows(given, N, TRAINED, "cpu") == head_buffers.chunk_rows(given, N, SCORING, "cpu") == chunk
    )
    assert N < 2048 or chunk * 8 <= N
    assert head_buffers.chunk_rows(given._replace(chunk_size=7), N, TRAINED, "cpu") == max(1, min(7, N))


@pytest.mark.parametrize(
    ("words", "dtype", "needs", "chunk"),
    [
        (128256, torch.bfloat16, TRAINED, 4096),
        (152064, torch.bfloat16, TRAINED, 3456),
        (128256, torch.float32, TRAINED, 2048),
        (400000, torch.bfloat16, TRAINED, 2048),
        (32000, torch.float32, TRAINED, 4096),
        (128256, torch.bfloat16, NeedsGrad(True, False, False), 1024),
        (128256, torch.bfloat16, SCORING, 1024),
    ],
)
def test_the_rule_on_a_gpu(words: int, dtype: torch.dtype, needs: NeedsGrad, chunk: int) -> None:
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, D, device="cuda", dtype=dtype) for n in (8192, words))
        given = LinearCall(hidden, weight, None, hidden, None, None, None, None, None, 1.0, None, False, "torch")
        assert head_buffers.chunk_rows(given, 8192, needs, "cuda") == chunk
        assert head_buffers.chunk_rows(given, 100, needs, "cuda") == 100


@pytest.mark.parametrize(
    ("half", "softcap", "dtype", "separate"),
    [
        (False, None, torch.float32, True),
        (True, None, torch.bfloat16, False),
        (True, 5.0, torch.float32, True),
    ],
)
def test_half_logits_on_a_gpu(half: bool, softcap: float | None, dtype: torch.dtype, separate: bool) -> None:
    """Logits in the dtype of hidden states are replaced by their gradient; softcap needs the digits of float32."""
    with FakeTensorMode():
        hidden, weight = (torch.empty(n, D, device="cuda", dtype=torch.bfloat16) for n in (8192, V))
        given = LinearCall(hidden, weight, None, hidden, None, None, None, None, softcap, 1.0, None, half, "torch")
        buffers = Buffers.of(given, 8192, TRAINED, "cuda")
    assert (buffers.dtype, buffers.separate) == (dtype, separate)


def test_the_largest_head_on_a_gpu_keeps_within_its_memory() -> None:
    """8192 x 4096 x 128,256: 3.3 GiB at the last chunk, when all gradients exist; other rows add only their own."""
    words, width = 128256, 4096
    held, needs = [], NeedsGrad(True, True, False)
    for rows in (8192, 65536):
        with FakeTensorMode():
            hidden, weight = (torch.empty(n, width, device="cuda", dtype=torch.bfloat16) for n in (rows, words))
            given = LinearCall(hidden, weight, None, hidden, None, None, None, None, None, 1.0, None, False, "torch")
            layout = Layout(given, Buffers.of(given, rows, needs, "cuda"))
            tensors = (layout._storage, *Gradients.unset(given, needs, every_row=True))
        held.append(sum(x.nbytes for x in tensors) - 2 * rows * width)
        tiles: list[int] = []
        while (left := 4096 - sum(tiles)) > 0:
            tiles.append(min(left, layout.rows(sum(tiles))))
        assert tiles == [1664, 1152, 768, 512]  # whole blocks of 128 rows, which a GPU's products come in
    assert held[0] == held[1] <= 3.3 * 2**30 - 8192 * (2 * width + 4 * PER_ROW)


def test_tiles_of_a_chunk_share_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits never lie where the chunk's gradient is; the first tiles find more room than the last."""
    monkeypatch.setitem(head_buffers._TILE, "cpu", 128)
    hidden, weight = torch.empty(1300, D, dtype=torch.bfloat16), torch.empty(33, D, dtype=torch.bfloat16)
    given = LinearCall(hidden, weight, None, hidden, None, hidden, None, None, 3.0, 1.0, 1024, False, "torch")
    buffers = Buffers.of(given, 1300, TRAINED, "cpu")
    layout = Layout(given, buffers)
    assert layout._storage.nbytes - buffers.bytes(given) < 1024
    for start, stop, sizes in ((0, 1024, [256, 256, 128, 128, 128, 128]), (1024, 1300, [256, 20])):
        tiles, whole = list(layout.tiles(start, stop)), layout.gradient(stop - start)
        whole.zero_()
        assert [tile.last - tile.first for tile in tiles] == sizes
        assert tiles[0].last == stop
        assert tiles[-1].first == start
        for number, tile in enumerate(tiles, 1):
            assert tile.ref_logits is not None
            tile.logits.fill_(torch.nan)
            tile.ref_logits.fill_(-torch.inf)
            assert tile.logits.isnan().all()
            tile.gradient.fill_(number)
            assert tile.ref_logits.isinf().all()
        expected = [number for number, size in reversed(list(enumerate(sizes, 1))) for _ in range(size)]
        assert whole.isfinite().all()
        assert whole[:, 0].tolist() == expected
