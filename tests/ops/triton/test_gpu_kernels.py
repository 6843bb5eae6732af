"""The compiled Triton kernels on a GPU, at the vocabularies of language models."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.ops._backends import reference
from ppo_fast.ops._core.inputs import RowInputs
from tests.helpers import assert_near_truth, assert_same, no_host_sync

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SHAPE = (2, 5)
VOCABULARIES = [32, 50_257, 128_256]
CONFIG = pf.PolicyLossConfig(ent_coef=0.01, kl_coef=0.05, penalty_coef=0.1, dual_clip=2.0, temperature=0.8)


def _inputs(V: int, dtype: torch.dtype = torch.bfloat16, rows: tuple[int, int] = SHAPE) -> dict[str, Tensor]:
    return {
        "logits": (torch.randn(*rows, V, device=DEVICE) * 3).to(dtype),
        "targets": torch.randint(0, V, rows, device=DEVICE),
        "mask": torch.rand(rows, device=DEVICE) > 0.3,
        "ref": (torch.randn(*rows, V, device=DEVICE) * 3).to(dtype),
    }


def _loss(
    inputs: dict[str, Tensor], backend: str, config: pf.PolicyLossConfig = CONFIG
) -> tuple[pf.LossOutput, Tensor]:
    """The loss with seeded advantages and old log-probabilities, and the gradient of the logits."""
    logits = inputs["logits"].clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    shape = inputs["targets"].shape
    old, advantages, ref = torch.randn(3, *shape, generator=generator).to(DEVICE).sub(8.0).unbind()
    full = config.kl_estimator == "full"
    out = pf.policy_loss(
        logits,
        inputs["targets"],
        old,
        advantages + 8.0,
        inputs["mask"],
        config=config,
        ref_logprobs=None if full else ref,
        ref_logits=inputs["ref"] if full else None,
        backend=backend,
    )
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_token_stats(V: int, dtype: torch.dtype) -> None:
    x = _inputs(V, dtype)
    ours = pf.token_stats(x["logits"], x["targets"], ref_logits=x["ref"], mask=x["mask"], backend="triton")
    rows = RowInputs(x["logits"].double(), x["targets"], x["ref"].double(), x["mask"], 1.0)
    truth = reference.token_stats(rows, True)
    eager = reference.token_stats(rows._replace(logits=x["logits"].float(), ref_logits=x["ref"].float()), True)
    for got, expected, float32 in zip(ours, truth, eager, strict=False):
        assert got is not None
        assert_near_truth(got.cpu(), expected.cpu(), float32.cpu(), dtype=torch.float32)


@pytest.mark.parametrize("estimator", ["k3", "full"])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_policy_loss(V: int, estimator: str) -> None:
    config = pf.PolicyLossConfig(ent_coef=0.01, kl_coef=0.05, kl_estimator=estimator)
    inputs = _inputs(V, torch.float32)
    ours, ours_gradient = _loss(inputs, "triton", config)
    eager, eager_gradient = _loss(inputs, "torch", config)
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth, truth_gradient = _loss(double, "torch", config)
    assert_near_truth(ours.loss.cpu(), truth.loss.detach().cpu(), eager.loss.cpu(), dtype=torch.float32)
    assert_near_truth(
        ours_gradient.cpu(), truth_gradient.cpu(), eager_gradient.cpu(), dtype=torch.float32, gradient=True
    )
    for name, metric in ours.metrics.items():
        assert_near_truth(metric.cpu(), truth.metrics[name].cpu(), eager.metrics[name].cpu(), dtype=torch.float32)


@pytest.mark.parametrize("V", VOCABULARIES)
def test_logprobs_have_the_same_bits_in_every_op(V: int) -> None:
    x = _inputs(V)
    alone = pf.token_logprobs(x["logits"], x["targets"], mask=x["mask"], temperature=0.8, backend="triton")
    options = {"mask": x["mask"], "temperature": 0.8, "backend": "triton"}
    for ref in (None, x["ref"]):
        assert_same(pf.token_stats(x["logits"], x["targets"], ref_logits=ref, **options).logprobs, alone)
    out, _ = _loss(x, "triton")
    assert out.per_token is not None
    assert_same(out.per_token.logprobs, alone)


@pytest.mark.parametrize("V", VOCABULARIES)
def test_bits_of_a_row_do_not_depend_on_the_batch(V: int) -> None:
    x = _inputs(V, rows=(3, 701))
    x["mask"][:] = True

    def results(rows: tuple[slice, slice]) -> tuple[Tensor, ...]:
        logits = x["logits"][rows].clone().requires_grad_()
        stats = pf.token_stats(logits, x["targets"][rows], ref_logits=x["ref"][rows], backend="triton")
        assert stats.kl is not None
        (stats.logprobs + stats.entropy + stats.kl).sum().backward()
        assert logits.grad is not None
        return stats.logprobs.detach(), stats.entropy.detach(), stats.kl.detach(), logits.grad

    everything = results((slice(None), slice(None)))
    for one in [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(300, 333)), (slice(2, 3), slice(700, 701))]:
        assert_same(results(one), tuple(tensor[one] for tensor in everything))


def test_two_runs_give_the_same_bits() -> None:
    inputs = _inputs(50_257, rows=(8, 200))
    (first, first_gradient), (second, second_gradient) = _loss(inputs, "triton"), _loss(inputs, "triton")
    assert_same(first.loss.detach(), second.loss.detach())
    assert_same(first.metrics, second.metrics)
    assert_same(first_gradient, second_gradient)


def test_offsets_past_2_to_the_31() -> None:
    """17,000 rows of 128,256 words are 2.18e9 elements."""
    rows, V = 17_000, 128_256
    logits = torch.zeros(rows, V, dtype=torch.bfloat16, device=DEVICE)
    logits[-1, 5] = 30.0
    targets = torch.full((rows,), 5, device=DEVICE)
    logprobs = pf.token_logprobs(logits, targets, backend="triton")
    assert logprobs[-1].abs() < 1e-6
    assert_near_truth(logprobs[:-1].cpu(), -torch.full((rows - 1,), float(V)).double().log(), dtype=torch.float32)


def test_more_rows_than_a_grid_dimension() -> None:
    logits, targets = torch.randn(70_000, 16, device=DEVICE), torch.randint(0, 16, (70_000,), device=DEVICE)
    truth = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert_near_truth(pf.token_logprobs(logits, targets, backend="triton").cpu(), truth.cpu(), dtype=torch.float32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 128, 129, 3000])
def test_gae(T: int, packed: bool) -> None:
    rewards, values = torch.randn(2, 6, T, device=DEVICE)
    mask, dones = torch.rand(6, T, device=DEVICE) > 0.3, torch.rand(6, T, device=DEVICE) > 0.95
    bootstrap = torch.randn(6, device=DEVICE)
    truth = pf.gae(
        rewards.double(), values.double(), mask, bootstrap=bootstrap.double(), dones=dones, gamma=0.99, backend="torch"
    )
    if packed:
        flat = [x.flatten() for x in (rewards, values, mask, dones)]
        offsets = torch.arange(0, 6 * T + 1, T, device=DEVICE)
        ours = pf.gae_packed(
            flat[0], flat[1], offsets, mask=flat[2], bootstrap=bootstrap, dones=flat[3], gamma=0.99, backend="triton"
        )
    else:
        ours = pf.gae(rewards, values, mask, bootstrap=bootstrap, dones=dones, gamma=0.99, backend="triton")
    for got, expected in zip(ours, truth, strict=True):
        assert_near_truth(got.view(6, T).cpu(), expected.cpu(), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"chunk_size": 1100}, {"chunk_size": 600, "half_logits": True}, {"softcap": 5.0}]
)
@pytest.mark.parametrize("masked", [False, True])
def test_linear_policy_loss(masked: bool, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Chunks of several tiles, of different sizes."""
    N, D, V = 2300, 64, 5003
    head = torch.randn(N, D, device=DEVICE).to(dtype), (torch.randn(V, D, device=DEVICE) / 4).to(dtype)
    targets = torch.randint(0, V, (N,), device=DEVICE)
    mask = torch.rand(N, device=DEVICE) > 0.3 if masked else None
    old, advantages, ref = torch.randn(3, N, device=DEVICE).sub(torch.tensor([[8.0], [0.0], [8.0]], device=DEVICE))
    config = pf.PolicyLossConfig(clip_low=None, clip_high=None, ent_coef=0.1, kl_coef=0.1)

    def gradients(kind: torch.dtype, backend: str, **options: Any) -> tuple[Tensor, ...]:
        leaves = [x.to(kind).requires_grad_() for x in head]
        rows = targets, old.to(kind), advantages.to(kind), mask
        out = pf.linear_policy_loss(
            *leaves, *rows, config=config, ref_logprobs=ref.to(kind), backend=backend, **options
        )
        return out.loss.detach(), *torch.autograd.grad(out.loss, leaves)

    truth = gradients(torch.float64, "torch", softcap=options.get("softcap"))
    for ours, expected in zip(gradients(dtype, "triton", **options), truth, strict=True):
        error = (ours.double() - expected).norm() / expected.norm()
        rounded = 0.03 if "half_logits" in options else 0.02 if "softcap" in options else 0.01
        assert error < (1e-4 if dtype == torch.float32 else rounded)


def test_kernels_run_on_the_device_of_their_tensors() -> None:
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    logits, targets = torch.randn(4, 100, device=last), torch.randint(0, 100, (4,), device=last)
    with torch.cuda.device(0):
        ours = pf.token_logprobs(logits, targets, backend="triton")
        assert torch.cuda.current_device() == 0
    assert ours.device == last
    truth = logits.double().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert_near_truth(ours.cpu(), truth.cpu(), dtype=torch.float32)


@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.95}])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_sampling_equals_the_cpu_and_a_graph_reads_its_keys(V: int, filters: dict[str, Any]) -> None:
    logits, keys = (4 * torch.randn(8, V)).bfloat16(), torch.arange(24).view(8, 3)
    expected = pf.sample_tokens(logits, keys, backend="torch", **filters)
    logits, keys, zeros = logits.to(DEVICE), keys.to(DEVICE), torch.zeros(8, 3, dtype=torch.int64, device=DEVICE)
    with no_host_sync():
        pf.sample_tokens(logits, zeros, backend="triton", **filters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = pf.sample_tokens(logits, zeros, backend="triton", **filters)
    zeros.copy_(keys)
    graph.replay()
    assert_same(ours.tokens.cpu(), expected.tokens)
    assert_near_truth(ours.logprobs.cpu(), expected.logprobs, dtype=torch.float32)
