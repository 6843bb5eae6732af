"""patch_trl: each of TRL's functions against its replacement, on the same inputs."""

import importlib
import itertools
from typing import Any

import pytest
import torch

from ppo_fast.integrations import patch_trl
from tests.helpers import DTYPES
from tests.integrations.compare import assert_agree, outcome, rows

B, T, V = 3, 4, 11
INDEX = torch.arange(B * T).view(B, T) % V
TOP_K = torch.stack([INDEX, (INDEX + 1) % V, (INDEX + 5) % V], -1)
TWICE = torch.stack([INDEX, (INDEX + 1) % V, INDEX], -1)
LOGPROBS = "trl.trainer.utils.selective_log_softmax"
ENTROPY = "trl.trainer.utils.entropy_from_logits"


@pytest.fixture
def theirs() -> Any:
    """The module of TRL that defines them."""
    return importlib.import_module("trl.trainer.utils")


def compare(name: str, dtype: torch.dtype, *args: Any, scale: float = 3.0, **kwargs: Any) -> None:
    """The function ``name`` before and after the patch, which must have run its op."""
    theirs = importlib.import_module("trl.trainer.utils")
    logits = rows(0, B, T, V, dtype=dtype, scale=scale)
    expected = outcome(getattr(theirs, name), [logits], *args, **kwargs)
    with patch_trl() as report:
        ours = outcome(getattr(theirs, name), [logits], *args, **kwargs)
    assert report.calls[f"trl.trainer.utils.{name}"] == 1
    assert not report.fallbacks
    assert_agree(ours, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [INDEX, TOP_K, TWICE, INDEX.unsqueeze(-1)], ids=["one", "top-k", "twice", "top-1"])
def test_selective_log_softmax(index: torch.Tensor, dtype: torch.dtype) -> None:
    compare("selective_log_softmax", dtype, index)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_from_logits(dtype: torch.dtype) -> None:
    compare("entropy_from_logits", dtype, chunk_size=5)


@pytest.mark.parametrize("index", [INDEX, TOP_K], ids=["one", "top-k"])
def test_dtype_under_autocast(index: torch.Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare("selective_log_softmax", torch.bfloat16, index)
        compare("entropy_from_logits", torch.bfloat16)


@pytest.mark.parametrize("index", [INDEX, TOP_K], ids=["one", "top-k"])
def test_large_offsets_and_banned_tokens(theirs: Any, index: torch.Tensor) -> None:
    logits = rows(0, B, T, V) + 3e4
    logits[..., 5] = -torch.inf
    expected = outcome(theirs.selective_log_softmax, [logits], index)
    with patch_trl():
        ours = outcome(theirs.selective_log_softmax, [logits], index)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=4e-3, rtol=0)  # ulp(3e4) is 2e-3
    assert ours[0].isneginf().any()


def test_entropy_of_banned_tokens_is_a_number(theirs: Any) -> None:
    logits = rows(0, B, T, V)
    logits[..., 5] = -torch.inf
    assert theirs.entropy_from_logits(logits).isnan().all()
    with patch_trl():
        without = torch.cat([logits[..., :5], logits[..., 6:]], -1)
        torch.testing.assert_close(theirs.entropy_from_logits(logits), theirs.entropy_from_logits(without))


def test_a_view_of_a_models_logits_is_read_in_place(theirs: Any) -> None:
    def shifted(logits: torch.Tensor) -> torch.Tensor:
        return theirs.selective_log_softmax(logits[:, :-1], INDEX[:, 1:])

    expected = outcome(shifted, [rows(1, B, T, V)])
    with patch_trl():
        assert_agree(outcome(shifted, [rows(1, B, T, V)]), expected, torch.float32)


def test_every_import_is_replaced_and_undone(theirs: Any) -> None:
    holders = (theirs, *(importlib.import_module(f"trl.trainer.{name}_trainer") for name in ("dpo", "grpo")))
    names = ("selective_log_softmax", "entropy_from_logits")
    pairs = [(module, name) for module, name in itertools.product(holders, names) if hasattr(module, name)]
    before = [getattr(module, name) for module, name in pairs]
    with patch_trl() as report:
        assert all(getattr(module, name) is not old for (module, name), old in zip(pairs, before, strict=True))
        places = report.replaced[LOGPROBS] + report.replaced[ENTROPY]
        assert {f"{module.__name__}.{name}" for module, name in pairs} <= set(places)
    assert [getattr(module, name) for module, name in pairs] == before


@pytest.mark.peers
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy_requires_grad", [True, False])
def test_both_in_one_of_newer_releases(dtype: torch.dtype, entropy_requires_grad: bool) -> None:
    row_mask = torch.arange(B * T).view(B, T) % 3 > 0
    for mask in (None, row_mask, row_mask.long()):
        options = {"temperature": 0.7, "row_mask": mask}
        compare("selective_log_softmax_and_entropy", dtype, INDEX, entropy_requires_grad, scale=1.0, **options)
        compare("selective_log_softmax", dtype, INDEX, scale=1.0, **options)


@pytest.mark.peers
def test_top_k_with_a_row_mask() -> None:
    compare("selective_log_softmax", torch.float32, TOP_K, temperature=0.7, row_mask=(TOP_K > 2).long())
