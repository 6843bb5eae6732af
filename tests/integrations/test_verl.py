"""patch_verl: each of verl's functions against its replacement, on the same inputs."""

import importlib
from typing import Any

import pytest
import torch

from ppo_fast.integrations import patch_verl
from tests.helpers import DTYPES
from tests.integrations.compare import assert_agree, outcome, rows

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
TORCH, CORE = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
B, T, V = 4, 6, 11
LABELS = torch.arange(B * T).view(B, T) % V
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
GLOBAL = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 7}


def compare(where: str, name: str, dtype: torch.dtype, leaves: list[Any], *args: Any, **kwargs: Any) -> None:
    """The function before and after the patch, which must have run its op."""
    module = importlib.import_module(where)
    expected = outcome(getattr(module, name), leaves, *args, **kwargs)
    with patch_verl() as report:
        ours = outcome(getattr(module, name), leaves, *args, **kwargs)
    assert report.calls == {f"{where}.{name}": 1}
    assert not report.fallbacks
    assert_agree(ours, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(B, T), (B * T,)], ids=["padded", "packed"])
def test_logprobs_from_logits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = rows(0, *shape, V, dtype=dtype, scale=3)
    compare(TORCH, "logprobs_from_logits", dtype, [logits], LABELS.view(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_from_logits(dtype: torch.dtype) -> None:
    # logsumexp - sum(p*z) cancels in half precision: what it loses with small logits is 4 ulp
    compare(TORCH, "entropy_from_logits", dtype, [rows(0, B, T, V, dtype=dtype, scale=0.5)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy_from_logits_with_chunking(dtype: torch.dtype) -> None:
    logits = rows(0, B * T, V, dtype=dtype)
    tolerance = torch.float32 if dtype == torch.float64 else dtype
    compare(TORCH, "entropy_from_logits_with_chunking", tolerance, [logits], chunk_size=5)


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    inputs = (rows(1, B, T, dtype=dtype), rows(2, B, T, dtype=dtype), MASK.to(mask_dtype))
    lam = torch.tensor(0.9) if dtype == torch.float32 else 0.9
    compare(CORE, "compute_gae_advantage_return", dtype, [], *inputs, gamma=0.97, lam=lam)


def actor_config(**changes: Any) -> Any:
    from verl.workers.config import ActorConfig

    options = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 4, "clip_ratio_c": 1.5}
    config = ActorConfig(**(options | {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}))
    config.global_batch_info.update(changes)
    return config


@pytest.mark.parametrize("sizes", [{}, GLOBAL, GLOBAL | {"loss_scale_factor": 9}], ids=["local", "global", "scaled"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss(mode: str, weighted: bool, sizes: dict[str, int]) -> None:
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    old, advantages = -rows(3, B, T).abs(), rows(4, B, T)
    log_prob = old + rows(5, B, T, scale=0.5)

    def vanilla(log_prob: torch.Tensor) -> Any:
        weights = rows(6, B, T).abs() if weighted else None
        return get_policy_loss_fn("vanilla")(old, log_prob, advantages, MASK, mode, actor_config(**sizes), weights)

    expected = outcome(vanilla, [log_prob])
    with patch_verl() as report:
        ours = outcome(vanilla, [log_prob])
    assert report.calls == {f"{CORE}.compute_policy_loss_vanilla": 1}
    assert_agree(ours, expected, torch.float32)
    assert min(ours[1].item(), ours[3].item()) > 0  # clipped, and dually


@pytest.mark.parametrize("sizes", [{}, GLOBAL, GLOBAL | {"loss_scale_factor": 9}], ids=["local", "global", "scaled"])
@pytest.mark.parametrize("mode", MODES)
def test_value_loss(mode: str, sizes: dict[str, int]) -> None:
    inputs = {"returns": rows(7, B, T), "values": rows(8, B, T), "response_mask": MASK, "cliprange_value": 0.3}
    options = inputs | sizes | {"loss_agg_mode": mode}
    compare(CORE, "compute_value_loss", torch.float32, [rows(9, B, T)], **options)


def test_what_the_ops_do_not_take_is_left_to_the_original() -> None:
    core = importlib.import_module(CORE)
    inputs = (rows(7, B, T), rows(8, B, T), rows(9, B, T), MASK)
    expected = core.compute_value_loss(*inputs, cliprange_value=0.0)
    with patch_verl() as report:
        torch.testing.assert_close(core.compute_value_loss(*inputs, cliprange_value=0.0), expected)
        with pytest.raises(ValueError, match="batch_num_tokens is required"):
            core.compute_value_loss(*inputs, cliprange_value=0.2, dp_size=2)
        core.compute_gae_advantage_return(*inputs[:2], MASK, 1.5, 0.9)
        assert not report.calls.total()
    assert {reason for _, reason in report.fallbacks} == {
        "a clip range of 0",
        "an aggregation that verl refuses or ppo_fast lacks",
        "gamma or lam outside [0, 1]",
    }


def test_registries_and_imports_are_replaced_and_undone() -> None:
    core = importlib.import_module(CORE)
    names = ("compute_gae_advantage_return", "compute_policy_loss_vanilla")
    before = [getattr(core, name) for name in names]
    with patch_verl() as report:
        assert core.POLICY_LOSS_REGISTRY["vanilla"] is core.compute_policy_loss_vanilla is not before[1]
        assert core.get_adv_estimator_fn("gae") is core.compute_gae_advantage_return is not before[0]
        assert len(report.replaced) == 6
    assert core.POLICY_LOSS_REGISTRY["vanilla"] is before[1]
    assert core.get_adv_estimator_fn("gae") is before[0]


def test_the_entropy_of_an_engine_compiles_without_a_graph_break() -> None:
    functional = importlib.import_module(TORCH)
    logits = rows(0, B, T, V)
    expected = functional.entropy_from_logits(logits)
    with patch_verl():
        entropy = torch.compile(functional.entropy_from_logits, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(entropy(logits), expected)
    torch._dynamo.reset()
