"""gae and gae_packed: against the double sum in float64, padded against packed, all mask modes."""

import itertools

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests import oracles
from tests.helpers import assert_near_truth, assert_same, each_backend, each_case

MODES = ("carry", "zero")
SHAPES = ((1, 1), (3, 1), (1, 33), (4, 17), (2, 130))


def make(B: int, T: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rewards, values, bootstrap, and a mask and dones with holes everywhere."""
    return {
        "rewards": torch.randn(B, T).to(dtype),
        "values": torch.randn(B, T).to(dtype),
        "bootstrap": torch.randn(B).to(dtype),
        "mask": torch.rand(B, T) < 0.7,
        "dones": torch.rand(B, T) < 0.15,
    }


def truth(
    inputs: dict[str, Tensor], segments: oracles.Segments, gamma: float, lam: float, mode: str
) -> tuple[Tensor, Tensor]:
    """The oracle's advantages and returns [N]; a missing input is what it defaults to."""
    N = inputs["rewards"].numel()
    defaults = {
        "mask": torch.ones(N, dtype=torch.bool),
        "dones": torch.zeros(N, dtype=torch.bool),
        "bootstrap": torch.zeros(len(segments)),
    }
    flat = {k: x.flatten() for k, x in {**defaults, **inputs}.items()}
    arrays = {k: (x.double() if x.is_floating_point() else x).numpy() for k, x in flat.items()}
    results = oracles.gae(counted=arrays.pop("mask"), segments=segments, gamma=gamma, lam=lam, mask_mode=mode, **arrays)
    return torch.from_numpy(results[0]), torch.from_numpy(results[1])


@each_case("gae")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_against_the_double_sum(backend: str, dtype: torch.dtype, shape: tuple[int, int], mode: str) -> None:
    inputs = make(*shape, dtype)
    for gamma, lam in ((1.0, 0.95), (0.9, 0.0), (0.97, 1.0), (0.0, 0.5)):
        expected = truth(inputs, oracles.padded_segments(*shape), gamma, lam, mode)
        ours = pf.gae(**inputs, gamma=gamma, lam=lam, mask_mode=mode, backend=backend)
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert_near_truth(a, b, dtype=dtype)
            assert not a[~inputs["mask"]].any()


@each_backend("gae")
@pytest.mark.parametrize("mode", MODES)
def test_every_subset_of_optional_inputs(backend: str, mode: str) -> None:
    inputs = make(3, 9, torch.float32)
    for r in range(4):
        for dropped in itertools.combinations(("mask", "dones", "bootstrap"), r):
            kept = {k: x for k, x in inputs.items() if k not in dropped}
            expected = truth(kept, oracles.padded_segments(3, 9), 0.97, 0.9, mode)
            ours = pf.gae(**kept, gamma=0.97, lam=0.9, mask_mode=mode, backend=backend)
            for a, b in zip(ours, expected, strict=True):
                assert_near_truth(a, b, dtype=torch.float32)


@each_case("gae_packed")
@pytest.mark.parametrize("offsets", [[0, 1], [0, 5, 5, 6, 38, 38], [0, 0, 64, 129]])
@pytest.mark.parametrize("mode", MODES)
def test_packed_against_the_double_sum(backend: str, dtype: torch.dtype, offsets: list[int], mode: str) -> None:
    S, N = len(offsets) - 1, offsets[-1]
    inputs = {k: x.flatten()[: S if k == "bootstrap" else N] for k, x in make(S, N, dtype).items()}
    expected = truth(inputs, oracles.packed_segments(offsets), 0.97, 0.9, mode)
    for kind in (torch.int32, torch.int64):
        cu_seqlens = torch.tensor(offsets, dtype=kind)
        ours = pf.gae_packed(**inputs, cu_seqlens=cu_seqlens, gamma=0.97, lam=0.9, mask_mode=mode, backend=backend)
        for a, b in zip(ours, expected, strict=True):
            assert_near_truth(a, b, dtype=dtype)


@each_backend("gae")
def test_mixed_dtypes_are_summed_in_the_wider(backend: str) -> None:
    inputs = make(3, 9, torch.float32)
    for rewards, values in itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2):
        mixed = {**inputs, "rewards": inputs["rewards"].to(rewards), "values": inputs["values"].to(values)}
        widened = {**mixed, "rewards": mixed["rewards"].float(), "values": mixed["values"].float()}
        assert_same(pf.gae(**mixed, backend=backend), pf.gae(**widened, backend=backend))


@each_backend("gae")
def test_carry_equals_the_sequence_without_its_masked_steps(backend: str) -> None:
    inputs = make(1, 12, torch.float32)
    mask = inputs.pop("mask")
    advantages, returns = pf.gae(**inputs, mask=mask, gamma=0.97, backend=backend)
    kept = {k: x[mask][None] if x.dim() == 2 else x for k, x in inputs.items()}
    shorter = pf.gae(**kept, gamma=0.97, backend=backend)
    torch.testing.assert_close((advantages[mask][None], returns[mask][None]), shorter)


@each_backend("gae")
def test_the_modes_agree_on_right_padded_rows(backend: str) -> None:
    inputs = make(3, 9, torch.float32)
    del inputs["bootstrap"]
    inputs["mask"] = torch.arange(9) < torch.tensor([[9], [4], [1]])
    assert_same(*(pf.gae(**inputs, gamma=0.97, mask_mode=mode, backend=backend) for mode in MODES))


@each_backend("gae_packed")
@pytest.mark.parametrize("mode", MODES)
def test_packed_equals_padded_row_by_row(backend: str, mode: str) -> None:
    inputs = make(4, 17, torch.float32)
    padded = pf.gae(**inputs, gamma=0.97, mask_mode=mode, backend=backend)
    flat = {k: x.flatten() for k, x in inputs.items()}
    packed = pf.gae_packed(**flat, cu_seqlens=torch.arange(0, 69, 17), gamma=0.97, mask_mode=mode, backend=backend)
    for a, b in zip(packed, padded, strict=True):
        torch.testing.assert_close(a, b.flatten())


@each_backend("gae")
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 3), (3, 0), (0,)])
def test_free_shapes(backend: str, shape: tuple[int, ...]) -> None:
    rewards, values, bootstrap = torch.randn(shape), torch.randn(shape), torch.randn(shape[:-1])
    advantages, returns = pf.gae(rewards, values, bootstrap=bootstrap, backend=backend)
    assert advantages.shape == returns.shape == shape
    if advantages.numel():
        flat = [x.reshape(-1, shape[-1]) for x in (rewards, values)]
        assert_same(advantages.view_as(flat[0]), pf.gae(*flat, bootstrap=bootstrap.flatten(), backend=backend)[0])


@each_backend("gae_packed")
@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]])
def test_packed_without_tokens(backend: str, offsets: list[int]) -> None:
    nothing = torch.zeros(0)
    for bootstrap in (None, torch.ones(len(offsets) - 1)):
        results = pf.gae_packed(nothing, nothing, torch.tensor(offsets), bootstrap=bootstrap, backend=backend)
        assert [x.shape for x in results] == [(0,), (0,)]


@each_backend("gae")
def test_results_carry_no_gradient(backend: str) -> None:
    rewards, values = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    bootstrap = torch.randn(2, requires_grad=True)
    results = pf.gae(rewards, values, bootstrap=bootstrap, backend=backend)
    assert not any(x.requires_grad for x in results)
