"""The arithmetic of the CUDA scan, driven on the host thread by thread: gae_scan_host.cpp around csrc/gae/scan.h."""

import ctypes
import itertools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.csrc.plain import Array, plain_gae, plain_gae_packed

HERE = Path(__file__).parent
WARP_TILE, BLOCK_TILE = 256, 1024  # steps: 8 a thread, 32 threads a warp, 4 warps a block
BORDERS = (1, 7, 8, 9, WARP_TILE - 1, WARP_TILE, WARP_TILE + 1, BLOCK_TILE, BLOCK_TILE + 1, 2 * BLOCK_TILE + 5)
GROUPS = {"warp": 10**9, "block": 0}  # the longest sequence that one warp scans
GAMMA, LAM = 0.99, 0.95
Scan = Callable[..., tuple[Array, Array]]


def _pointer(x: Array | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.ctypes.data)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Scan:
    """``scan(rewards, values, mask, bootstrap, dones, mask_mode, group, cu_seqlens=None)`` in float64."""
    library = tmp_path_factory.mktemp("scan") / "scan.so"
    compiler = os.environ.get("CXX", "g++")
    source = str(HERE / "gae_scan_host.cpp")
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            f"-I{HERE.parents[1] / 'csrc'}",
            "-O1",
            "-shared",
            "-fPIC",
            source,
            "-o",
            str(library),
        ],
        check=True,
    )
    function = ctypes.CDLL(str(library)).gae_scan_host
    function.restype = ctypes.c_int64

    def run(
        rewards: Array,
        values: Array,
        mask: Array | None,
        bootstrap: Array | None,
        dones: Array | None,
        mask_mode: str,
        group: str,
        cu_seqlens: list[int] | None = None,
    ) -> tuple[Array, Array]:
        strides = [s for x in (rewards, values, mask, dones) for s in _strides(x)]
        offsets = None if cu_seqlens is None else np.array(cu_seqlens, np.int64)
        guard = 16
        results = [np.full(rewards.size + 2 * guard, np.nan) for _ in range(2)]
        misaligned = function(
            *map(_pointer, (rewards, values, mask, dones)),
            (ctypes.c_int64 * 8)(*strides),
            _pointer(bootstrap),
            _pointer(offsets),
            ctypes.c_int64(len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1),
            ctypes.c_int64(rewards.shape[-1]),
            ctypes.c_double(GAMMA),
            ctypes.c_double(LAM),
            ctypes.c_int(mask_mode == "carry"),
            ctypes.c_int64(GROUPS[group]),
            *(_pointer(x[guard:]) for x in results),
        )
        assert misaligned == 0
        for x in results:
            assert np.isnan(x[:guard]).all()
            assert np.isnan(x[-guard:]).all()
        advantages, returns = (x[guard:-guard].reshape(rewards.shape) for x in results)
        return advantages, returns

    return run


def _strides(x: Array | None) -> tuple[int, int]:
    """Of the sequences and of the steps, in elements."""
    if x is None:
        return 0, 0
    return (x.strides[0] // x.itemsize if x.ndim == 2 else 0), x.strides[-1] // x.itemsize


def _inputs(shape: tuple[int, ...], sequences: int, *, mask: bool, dones: bool, seed: int = 0) -> dict[str, Any]:
    """Random inputs; what does not count is NaN or infinite."""
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=shape), rng.normal(size=shape)
    counted = rng.random(shape) < 0.7 if mask else None
    if counted is not None:
        rewards, values = np.where(counted, rewards, np.nan), np.where(counted, values, np.inf)
    done = rng.random(shape) < 0.02 if dones else None
    return {
        "rewards": rewards,
        "values": values,
        "mask": counted,
        "bootstrap": rng.normal(size=sequences),
        "dones": done,
    }


def _assert_near(ours: tuple[Array, Array], plain: tuple[Array, Array]) -> None:
    for x, y in zip(ours, plain, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("T", BORDERS)
def test_thread_warp_and_block_borders(scan: Scan, T: int, group: str) -> None:
    for mask_mode, mask, dones in itertools.product(("carry", "zero"), (False, True), (False, True)):
        inputs = _inputs((3, T), 3, mask=mask, dones=dones, seed=T)
        ours = scan(**inputs, mask_mode=mask_mode, group=group)
        _assert_near(ours, plain_gae(**inputs, gamma=GAMMA, lam=LAM, mask_mode=mask_mode))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
def test_packed_offsets_of_every_alignment(scan: Scan, mask_mode: str, group: str) -> None:
    lengths = [0, 1, 7, 0, 8, 9, 255, 256, 258, 1024, 1031, 3, 2500, 2, 0]
    cu_seqlens = [0, *itertools.accumulate(lengths)]
    inputs = _inputs((cu_seqlens[-1],), len(lengths), mask=True, dones=True)
    ours = scan(**inputs, mask_mode=mask_mode, group=group, cu_seqlens=cu_seqlens)
    plain = plain_gae_packed(**inputs, cu_seqlens=cu_seqlens, gamma=GAMMA, lam=LAM, mask_mode=mask_mode)
    _assert_near(ours, plain)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mask_mode", ["carry", "zero"])
@pytest.mark.parametrize(
    "hole", [(0, 300), (200, 2000), (2000, 2100), (0, 2100), (2099, 2100), (255, 257), (1023, 1025)]
)
def test_holes_longer_than_a_thread_a_warp_and_a_block(
    scan: Scan, hole: tuple[int, int], mask_mode: str, group: str
) -> None:
    inputs = _inputs((2, 2100), 2, mask=False, dones=False)
    inputs["mask"] = np.ones((2, 2100), bool)
    inputs["mask"][1, hole[0] : hole[1]] = False
    ours = scan(**inputs, mask_mode=mask_mode, group=group)
    _assert_near(ours, plain_gae(**inputs, gamma=GAMMA, lam=LAM, mask_mode=mask_mode))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("done", [0, 7, 8, 255, 256, 1023, 1024, 2099])
def test_a_done_at_a_border_cuts_the_sequence(scan: Scan, done: int, group: str) -> None:
    inputs = _inputs((1, 2100), 1, mask=False, dones=False)
    inputs["dones"] = np.arange(2100)[None] == done
    ours = scan(**inputs, mask_mode="carry", group=group)
    _assert_near(ours, plain_gae(**inputs, gamma=GAMMA, lam=LAM, mask_mode="carry"))
    inputs["rewards"][0, done + 1 :] = 1e30
    assert scan(**inputs, mask_mode="carry", group=group)[0][0, done] == ours[0][0, done]


@pytest.mark.parametrize("group", GROUPS)
def test_strides(scan: Scan, group: str) -> None:
    inputs = _inputs((5, 700), 5, mask=True, dones=True)
    expected = scan(**inputs, mask_mode="carry", group=group)
    layouts: list[Callable[[Array], Array]] = [
        lambda x: np.ascontiguousarray(x.T).T,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: np.pad(x, ((0, 0), (3, 6)))[:, 3:-6],
    ]
    for layout in layouts:
        strided = {k: layout(x) if x.ndim == 2 else x for k, x in inputs.items()}
        for x, y in zip(scan(**strided, mask_mode="carry", group=group), expected, strict=True):
            np.testing.assert_array_equal(x, y)


def test_offsets_that_leave_the_buffers_are_clamped(scan: Scan) -> None:
    inputs = _inputs((40,), 3, mask=False, dones=False)
    ours = scan(**inputs, mask_mode="carry", group="warp", cu_seqlens=[-8, 20, 10, 900])
    plain = plain_gae_packed(**inputs, cu_seqlens=[0, 20, 20, 40], gamma=GAMMA, lam=LAM, mask_mode="carry")
    np.testing.assert_allclose(ours[0][:10], plain[0][:10], rtol=1e-12)
