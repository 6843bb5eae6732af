"""The extension's gae: native against the plain recursion bit for bit, CUDA against native."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppo_fast import gae, gae_packed
from ppo_fast.ops._backends.native import gae as native_gae
from ppo_fast.ops._core.inputs import GaeInputs
from tests.csrc.plain import plain_gae, plain_gae_packed
from tests.helpers import no_host_sync

GAMMA, LAM = 0.99, 0.95
MODES = ("carry", "zero")
Inputs = dict[str, Any]


def _inputs(shape: tuple[int, ...], sequences: int, dtype: torch.dtype, *, mask: bool, dones: bool) -> Inputs:
    """Random inputs; what does not count is NaN or infinite."""
    rewards, values = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    counted = torch.rand(shape) < 0.7 if mask else None
    if counted is not None:
        rewards = rewards.masked_fill(~counted, float("nan"))
        values = values.masked_fill(~counted, float("inf"))
    done = torch.rand(shape) < 0.05 if dones else None
    return {
        "rewards": rewards,
        "values": values,
        "mask": counted,
        "bootstrap": torch.randn(sequences, dtype=dtype),
        "dones": done,
    }


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _as_numpy(inputs: Inputs) -> Inputs:
    return {k: None if x is None else x.numpy() for k, x in inputs.items()}


def _assert_bitwise(ours: tuple[Tensor, Tensor], plain: tuple[Any, Any]) -> None:
    for x, y in zip(ours, plain, strict=True):
        y = torch.as_tensor(y)
        assert x.dtype == y.dtype
        assert x.is_contiguous()
        bits = torch.int64 if x.dtype == torch.float64 else torch.int32
        assert torch.equal(x.view(bits), y.contiguous().view(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 1), (1, 64), (16, 64), (17, 65), (33, 200), (2, 4), (16, 127), (18, 2051)], ids=str
)
def test_native_is_the_plain_recursion_to_the_last_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for mask_mode in MODES:
        for flags in range(4):
            inputs = _inputs(shape, shape[0], dtype, mask=bool(flags & 1), dones=bool(flags & 2))
            ours = gae(**inputs, gamma=GAMMA, lam=LAM, mask_mode=mask_mode, backend="native")
            _assert_bitwise(ours, plain_gae(**_as_numpy(inputs), gamma=GAMMA, lam=LAM, mask_mode=mask_mode))


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("mask_mode", MODES)
def test_native_packed_is_the_plain_recursion_to_the_last_bit(mask_mode: str, index: torch.dtype) -> None:
    lengths = [0, 1, 1023, 1024, 1026, 0, 200, 3, *range(20), 2500, 0]
    cu_seqlens = _offsets(lengths)
    inputs = _inputs((sum(lengths),), len(lengths), torch.float32, mask=True, dones=True)
    arguments = {"gamma": GAMMA, "lam": LAM, "mask_mode": mask_mode}
    ours = gae_packed(**inputs, cu_seqlens=cu_seqlens.to(index), **arguments, backend="native")
    _assert_bitwise(ours, plain_gae_packed(**_as_numpy(inputs), cu_seqlens=cu_seqlens.tolist(), **arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_and_mixed_dtypes_are_widened_first(dtype: torch.dtype) -> None:
    inputs = _inputs((5, 70), 5, dtype, mask=True, dones=True)
    inputs["rewards"] = inputs["rewards"].float()
    widened = {k: x.float() if x.is_floating_point() else x for k, x in inputs.items()}
    ours = gae(**inputs, gamma=GAMMA, lam=LAM, backend="native")
    _assert_bitwise(ours, gae(**widened, gamma=GAMMA, lam=LAM, backend="native"))
    assert gae(inputs["rewards"].double(), inputs["values"], backend="native")[0].dtype == torch.float64


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "time-major": lambda x: x.T.contiguous().T,
    "every second step": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "columns of a wider tensor": lambda x: torch.nn.functional.pad(x, (3, 6))[:, 3:-6],
    "every second sequence": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


class _Dispatched(TorchDispatchMode):
    """Records the torch operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("B", "T"), [(5, 130), (40, 1100)])
def test_strided_inputs_are_read_in_place(B: int, T: int, layout: str) -> None:
    inputs = _inputs((B, T), B, torch.float32, mask=True, dones=True)
    expected = gae(**inputs, gamma=GAMMA, lam=LAM, backend="native")
    strided = {k: LAYOUTS[layout](x) if x.dim() == 2 else x for k, x in inputs.items()}
    assert not strided["rewards"].is_contiguous()
    with _Dispatched() as dispatched:
        ours = native_gae.gae(GaeInputs(**strided, cu_seqlens=None, gamma=GAMMA, lam=LAM, mask_mode="carry"))
    _assert_bitwise(ours, expected)
    assert set(dispatched.names) == {"aten.empty_like.default"}  # nothing is copied


def test_an_expanded_mask_and_a_packed_stride_are_read_in_place() -> None:
    row = torch.arange(90) % 3 > 0
    inputs = _inputs((4, 90), 4, torch.float32, mask=False, dones=False)
    inputs["mask"] = row.expand(4, 90)
    ours = gae(**inputs, gamma=GAMMA, lam=LAM, backend="native")
    _assert_bitwise(ours, gae(**{**inputs, "mask": row.repeat(4, 1)}, gamma=GAMMA, lam=LAM, backend="native"))
    x, y, cu_seqlens = torch.randn(60, 2), torch.randn(60, 2), _offsets([10, 50])
    ours = gae_packed(x[:, 1], y[:, 0], cu_seqlens, backend="native")
    _assert_bitwise(ours, gae_packed(x[:, 1].contiguous(), y[:, 0].contiguous(), cu_seqlens, backend="native"))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(two_threads: None) -> None:
    inputs = _inputs((100, 400), 100, torch.float32, mask=True, dones=True)
    two = gae(**inputs, gamma=GAMMA, lam=LAM, backend="native")
    torch.set_num_threads(1)
    _assert_bitwise(two, gae(**inputs, gamma=GAMMA, lam=LAM, backend="native"))


def test_a_forked_child_does_not_wait_for_threads_it_has_not() -> None:
    script = """
import os, torch
torch.set_num_threads(2)
from ppo_fast.ops._backends.native import gae as native_gae
from ppo_fast.ops._core.inputs import GaeInputs
x = torch.randn(100, 400)
inputs = GaeInputs(x, x, None, None, None, None, 0.99, 0.95, "carry")
expected = native_gae.gae(inputs)[0]
child = os.fork()
if child == 0:
    os._exit(0 if native_gae.gae(inputs)[0].numpy().tobytes() == expected.numpy().tobytes() else 3)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_shapes(shape: tuple[int, int]) -> None:
    empty = torch.empty(shape)
    flags = torch.empty(shape, dtype=torch.bool)
    advantages, returns = gae(empty, empty, flags, dones=flags, bootstrap=torch.zeros(shape[0]), backend="native")
    assert advantages.shape == returns.shape == shape


def test_no_packed_rows() -> None:
    for sequences in (0, 1, 40):
        cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
        assert gae_packed(torch.empty(0), torch.empty(0), cu_seqlens, backend="native")[0].shape == (0,)


def test_many_short_sequences() -> None:
    inputs = _inputs((70_001, 2), 70_001, torch.float32, mask=False, dones=True)
    ours = gae(**inputs, gamma=GAMMA, lam=LAM, backend="native")
    _assert_bitwise(ours, plain_gae(**_as_numpy(inputs), gamma=GAMMA, lam=LAM, mask_mode="carry"))


def test_inputs_that_require_grad() -> None:
    rewards, values = torch.randn(3, 9), torch.randn(3, 9, requires_grad=True)
    advantages, returns = gae(rewards, values, backend="native")
    assert not advantages.requires_grad
    assert not returns.requires_grad


# On a CUDA device.

BORDERS = [(3, 1), (3, 255), (5, 256), (3, 1023), (4, 1024), (3, 1025), (2, 5000), (4096, 128), (3000, 257)]


def _on_gpu(inputs: Inputs) -> Inputs:
    return {k: None if x is None else x.cuda() for k, x in inputs.items()}


def _assert_near(ours: tuple[Tensor, Tensor], native: tuple[Tensor, Tensor]) -> None:
    """Two float32 sums of different order: 32 ulp of the largest."""
    for x, y in zip(ours, native, strict=True):
        scale = max(1.0, y.abs().max().item()) if y.numel() else 1.0
        torch.testing.assert_close(x.cpu().double(), y.double(), rtol=0, atol=32 * 2**-23 * scale)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BORDERS, ids=str)
def test_cuda_equals_native(shape: tuple[int, int]) -> None:
    for mask_mode in MODES:
        for flags in range(4):
            inputs = _inputs(shape, shape[0], torch.float32, mask=bool(flags & 1), dones=bool(flags & 2))
            arguments = {"gamma": GAMMA, "lam": LAM, "mask_mode": mask_mode}
            truth = gae(
                **{k: x if x is None or x.dtype == torch.bool else x.double() for k, x in inputs.items()}, **arguments
            )
            _assert_near(gae(**_on_gpu(inputs), **arguments, backend="cuda"), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("rewards", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cuda_takes_every_pair_of_dtypes(rewards: torch.dtype, values: torch.dtype) -> None:
    inputs = _inputs((7, 700), 7, torch.float32, mask=True, dones=True)
    inputs["rewards"], inputs["values"] = inputs["rewards"].to(rewards), inputs["values"].to(values)
    ours = gae(**_on_gpu(inputs), gamma=GAMMA, lam=LAM, backend="cuda")
    assert ours[0].dtype == torch.float32
    _assert_near(ours, gae(**inputs, gamma=GAMMA, lam=LAM, backend="native"))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_reads_strided_inputs(layout: str) -> None:
    inputs = _inputs((9, 1300), 9, torch.float32, mask=True, dones=True)
    on_gpu = _on_gpu(inputs)
    expected = gae(**on_gpu, gamma=GAMMA, lam=LAM, backend="cuda")
    strided = {k: LAYOUTS[layout](x) if x.dim() == 2 else x for k, x in on_gpu.items()}
    for x, y in zip(gae(**strided, gamma=GAMMA, lam=LAM, backend="cuda"), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("sequences", [13, 3000])
def test_cuda_packed_equals_native(sequences: int) -> None:
    lengths = [(37 * s * s) % 601 for s in range(sequences - 1)] + [9001]
    inputs = _inputs((sum(lengths),), sequences, torch.float32, mask=True, dones=True)
    for mask_mode in MODES:
        arguments = {"cu_seqlens": _offsets(lengths), "gamma": GAMMA, "lam": LAM, "mask_mode": mask_mode}
        native = gae_packed(**inputs, **arguments, backend="native")
        arguments["cu_seqlens"] = arguments["cu_seqlens"].cuda()
        _assert_near(gae_packed(**_on_gpu(inputs), **arguments, backend="cuda"), native)


@pytest.mark.gpu
def test_cuda_runs_twice_to_the_same_bits() -> None:
    on_gpu = _on_gpu(_inputs((3000, 700), 3000, torch.float32, mask=True, dones=True))
    first, second = (gae(**on_gpu, gamma=GAMMA, lam=LAM, backend="cuda") for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    rewards, values = torch.zeros(64, 4096, device="cuda"), torch.zeros(64, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        rewards.fill_(1.0)
        advantages, _ = gae(rewards, values, gamma=1.0, lam=1.0, backend="cuda")
    stream.synchronize()
    assert torch.equal(advantages[:, 0], torch.full((64,), 4096.0, device="cuda"))


@pytest.mark.gpu
def test_cuda_leaves_the_current_device_alone() -> None:
    last = torch.cuda.device_count() - 1
    x = torch.randn(4, 300)
    with torch.cuda.device(0):
        ours = gae(x.to(f"cuda:{last}"), x.to(f"cuda:{last}"), backend="cuda")
        assert torch.cuda.current_device() == 0
    assert ours[0].device.index == last
    _assert_near(ours, gae(x, x, backend="native"))


@pytest.mark.gpu
def test_cuda_does_not_wait_for_the_device() -> None:
    on_gpu = _on_gpu(_inputs((40, 300), 40, torch.bfloat16, mask=True, dones=True))
    packed = _on_gpu(_inputs((300,), 2, torch.float32, mask=True, dones=True))
    cu_seqlens = torch.tensor([0, 100, 300], device="cuda", dtype=torch.int32)
    with no_host_sync():
        gae(**on_gpu, backend="cuda")
        gae_packed(**packed, cu_seqlens=cu_seqlens, backend="cuda")
