"""patch_openrlhf: each of OpenRLHF's functions against its replacement, on the same inputs.

OpenRLHF's modules are the real ones; what they import that needs a GPU or a cluster is not there and stands empty.
"""

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from ppo_fast.integrations import patch_openrlhf
from tests.helpers import DTYPES
from tests.integrations.compare import assert_agree, floats, outcome, rows

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
EMPTY = ("aiohttp", "deepspeed", "flash_attn", "pylatexenc", "ray", "ring_flash_attn", "torchdata", "vllm")
UTILS, LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
B, T, V = 4, 6, 11
LABELS = torch.arange(B * T).view(B, T) % V
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])


class _Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every module of the packages in EMPTY, but flash-attn's kernels, which OpenRLHF can do without."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in EMPTY or name.startswith("flash_attn.ops"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = self._attribute  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass

    @staticmethod
    def _attribute(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


@pytest.fixture(autouse=True, scope="module")
def _importable() -> Iterator[None]:
    finder = _Empty()
    sys.meta_path.append(finder)
    yield
    sys.meta_path.remove(finder)
    for name in [name for name in sys.modules if name.split(".")[0] in (*EMPTY, "openrlhf")]:
        del sys.modules[name]


def compare(where: str, name: str, dtype: torch.dtype, leaves: list[Any], *args: Any, **kwargs: Any) -> None:
    """The function before and after the patch, which must have run its op."""
    module = importlib.import_module(where)
    expected = outcome(getattr(module, name), leaves, *args, **kwargs)
    with patch_openrlhf() as report:
        ours = outcome(getattr(module, name), leaves, *args, **kwargs)
    assert report.calls == {f"{where}.{name}": 1}
    assert not report.fallbacks
    assert_agree(ours, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(dtype: torch.dtype, temperature: float) -> None:
    logits = rows(0, B, T, V, dtype=dtype, scale=2)
    compare(UTILS, "log_probs_from_logits", dtype, [logits], LABELS, temperature=temperature)


def test_the_temperature_divides_the_logits_in_place() -> None:
    utils, logits = importlib.import_module(UTILS), rows(0, B, T, V)
    with patch_openrlhf():
        utils.log_probs_from_logits(logits, LABELS, temperature=0.5)
    torch.testing.assert_close(logits, rows(0, B, T, V) / 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compute_entropy(dtype: torch.dtype) -> None:
    compare(UTILS, "compute_entropy", dtype, [rows(0, B, T, V, dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_compute_approx_kl(estimator: str, dtype: torch.dtype) -> None:
    log_probs, base = rows(1, B, T, dtype=dtype, scale=8), rows(2, B, T, dtype=dtype, scale=8)  # some beyond the clamp
    tolerance = torch.float32 if dtype == torch.float64 else dtype  # the values are float32 in any case
    compare(UTILS, "compute_approx_kl", tolerance, [log_probs, base], kl_estimator=estimator)


@pytest.mark.parametrize("total", [{}, {"dp_size": 2, "batch_num_tokens": torch.tensor(40.0), "global_batch_size": 7}])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_policy_loss(dual_clip: float | None, kind: str, token_level: bool, total: dict[str, Any]) -> None:
    module = importlib.import_module(LOSS)
    loss = module.PolicyLoss(0.1, 0.3, dual_clip, token_level, kind)
    old = -rows(3, B, T).abs()
    inputs = [old + rows(5, B, T, scale=0.5)], old, rows(4, B, T), MASK
    expected = outcome(loss, *inputs, **total)
    with patch_openrlhf() as report:
        ours = outcome(loss, *inputs, **total)
    assert report.calls == {f"{LOSS}.PolicyLoss.forward": 1}
    assert_agree(ours, expected, torch.float32)
    assert ours[1] > 0  # clipped


@pytest.mark.parametrize("total", [{}, {"dp_size": 2, "batch_num_tokens": torch.tensor(40.0), "global_batch_size": 7}])
@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss(clip: float | None, token_level: bool, total: dict[str, Any]) -> None:
    loss = importlib.import_module(LOSS).ValueLoss(clip, token_level)
    inputs = [rows(1, B, T)], rows(2, B, T), rows(3, B, T), MASK
    expected = outcome(loss, *inputs, **total)
    with patch_openrlhf() as report:
        assert_agree(outcome(loss, *inputs, **total), expected, torch.float32)
    assert report.calls == {f"{LOSS}.ValueLoss.forward": 1}


@pytest.mark.parametrize("mask", [MASK, None], ids=["mask", "none"])
def test_gae(mask: torch.Tensor | None) -> None:
    maker = importlib.import_module(MAKER).RemoteExperienceMaker
    inputs = rows(1, B, T), rows(2, B, T), mask, 0.97, 0.9
    expected = maker.get_advantages_and_returns(None, *inputs)
    with patch_openrlhf() as report:
        ours = maker.get_advantages_and_returns(None, *inputs)
    assert report.calls.total() == 1
    assert_agree(floats(ours), floats(expected), torch.float32)


def test_what_the_ops_do_not_take_is_left_to_the_original() -> None:
    utils, losses = importlib.import_module(UTILS), importlib.import_module(LOSS)
    corrected = losses.PolicyLoss(is_correction_level="token")
    log_probs = -rows(3, B, T).abs()
    inputs = log_probs, log_probs * 1.1, rows(4, B, T), MASK, log_probs * 0.9
    expected = floats((corrected(*inputs), utils.compute_approx_kl(*inputs[:2], unbiased_gradient=True)))
    with patch_openrlhf() as report:
        ours = floats((corrected(*inputs), utils.compute_approx_kl(*inputs[:2], unbiased_gradient=True)))
        assert not report.calls.total()
        assert report.fallbacks.total() == 2
    assert_agree(ours, expected, torch.float32)


def test_every_import_is_replaced_and_undone() -> None:
    actor, utils = importlib.import_module("openrlhf.models.actor"), importlib.import_module(UTILS)
    importlib.import_module(MAKER)
    original = utils.log_probs_from_logits
    with patch_openrlhf() as report:
        assert actor.log_probs_from_logits is utils.log_probs_from_logits is not original
        assert f"{MAKER}.compute_approx_kl" in report.replaced[f"{UTILS}.compute_approx_kl"]
        assert len(report.replaced) == 6
    assert actor.log_probs_from_logits is utils.log_probs_from_logits is original
