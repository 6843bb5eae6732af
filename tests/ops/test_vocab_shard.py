"""A vocabulary split over two processes gives the results and gradients of the whole one, on every backend."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ppo_fast as pf
from ppo_fast.ops._core.inputs import RowInputs
from ppo_fast.ops._core.vocab_shard import VocabShard
from tests import interpreter
from tests.helpers import INTERPRETED, backends_under_test, cases_under_test, raises_exactly

WORLD = 2
B, T, D = 3, 5, 6
SIZES = (8, 5)
V = sum(SIZES)
# Sums over ranks are rounded once more than those of one process.
RTOL = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}

TOKEN = pf.PolicyLossConfig(dual_clip=1.5, penalty_coef=0.1, ent_coef=0.2, kl_coef=0.3)
FULL = pf.PolicyLossConfig(
    ratio="sequence", kl_estimator="full", kl_coef=0.3, ent_coef=0.1, aggregation="seq-mean-token-mean"
)
PLAIN = pf.PolicyLossConfig(temperature=0.7, aggregation="seq-mean-token-sum")


class Case(NamedTuple):
    """Inputs in float64; a slice of the vocabulary is taken of the last dimension of logits, the first of heads."""

    logits: Tensor
    ref_logits: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    targets: Tensor
    mask: Tensor
    tokens: dict[str, Tensor]


def make_case() -> Case:
    """Rows with an offset, a row that only rank 0 gives probability, and one whose reference does as well."""
    made = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    logits, ref_logits = 2 * normal(B, T, V), 2 * normal(B, T, V)
    logits[0, 1] += 300.0
    targets = torch.randint(V, (B, T), generator=made)
    logits[1, 0, SIZES[0] :] = logits[1, 2, SIZES[0] :] = ref_logits[1, 2, SIZES[0] :] = -torch.inf
    targets[1, 0] = targets[1, 2] = 3
    ref_logits[2, 0, SIZES[0] :] = -torch.inf  # an infinite KL
    tokens = {"advantages": normal(B, T), "importance_weights": normal(B, T).abs()}
    tokens["old_logprobs"] = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0] + 0.3 * normal(B, T)
    mask = torch.rand((B, T), generator=made) < 0.8
    mask[1, :3] = mask[2, 0] = True
    heads = (normal(B, T, D), normal(V, D), normal(V), normal(B, T, D + 1), normal(V, D + 1))
    return Case(logits, ref_logits, *heads, targets, mask, tokens)


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """The same with every float in a number of ``dtype``."""

    def near(x: Tensor) -> Tensor:
        return x.to(dtype).double() if x.is_floating_point() else x

    *tensors, tokens = case
    return Case(*map(near, tensors), {name: near(x) for name, x in tokens.items()})


def sliced(x: Tensor, rank: int | None, dim: int) -> Tensor:
    """The words of a rank; all of them for None."""
    return x if rank is None else x.split(SIZES, dim)[rank]


Run = Callable[[Case, torch.dtype, str, int | None], tuple[list[Tensor], list[Tensor]]]


def group_of(rank: int | None) -> dict[str, Any]:
    return {} if rank is None else {"group": dist.group.WORLD}


def stats(case: Case, dtype: torch.dtype, backend: str, rank: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """Results that every rank has whole, and gradients of which it has its slice."""
    logits = sliced(case.logits, rank, -1).to(dtype).requires_grad_()
    ref_logits = sliced(case.ref_logits, rank, -1).to(dtype)
    options = {"mask": case.mask, "temperature": 0.8, "backend": backend, **group_of(rank)}
    found = pf.token_stats(logits, case.targets, ref_logits=ref_logits, **options)
    loss = (case.tokens["advantages"] * (found.logprobs - 0.7 * found.entropy)).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    others = [pf.token_logprobs(logits, case.targets, **options), pf.entropy(logits, **options)]
    assert found.kl is not None
    return [x.detach() for x in (*found[:2], found.kl, *others)], [grad]


def policy(config: pf.PolicyLossConfig, packed: bool = False, inplace: bool = False) -> Run:
    """policy_loss from logits."""

    def run(case: Case, dtype: torch.dtype, backend: str, rank: int | None) -> tuple[list[Tensor], list[Tensor]]:
        logits = sliced(case.logits, rank, -1).to(dtype).requires_grad_()
        shape = (B * T,) if packed else (B, T)
        tokens = {name: x.to(dtype).reshape(shape) for name, x in case.tokens.items()}
        options: dict[str, Any] = {"config": config, "backend": backend, "inplace": inplace, **tokens, **group_of(rank)}
        if packed:
            options["cu_seqlens"] = torch.tensor([0, 4, 4, B * T])
        if config.kl_estimator == "full":
            # A reference that is -inf where the policy is not would make every comparison one of infinities.
            reference = case.ref_logits.nan_to_num(neginf=-4.0)
            options["ref_logits"] = sliced(reference, rank, -1).to(dtype).reshape(*shape, -1)
        elif config.kl_coef:
            options["ref_logprobs"] = tokens["old_logprobs"] - 0.2
        out = pf.policy_loss(
            (1.0 * logits).reshape(*shape, -1),
            case.targets.reshape(shape),
            mask=case.mask.reshape(shape),
            denominator=7.0,
            **options,
        )
        assert out.per_token is not None
        (grad,) = torch.autograd.grad(2 * out.loss, logits)
        kl = [] if out.per_token.kl is None else [out.per_token.kl]
        return [out.loss.detach(), *out.metrics.values(), out.per_token.logprobs, out.per_token.entropy, *kl], [grad]

    return run


def head(case: Case, dtype: torch.dtype, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    return (
        case.hidden.to(dtype).requires_grad_(),
        sliced(case.weight, rank, 0).to(dtype).requires_grad_(),
        sliced(case.bias, rank, 0).to(dtype).requires_grad_(),
    )


def linear_stats(case: Case, dtype: torch.dtype, backend: str, rank: int | None) -> tuple[list[Tensor], list[Tensor]]:
    """linear_token_stats; the gradient of the hidden states is whole on every rank."""
    hidden, weight, bias = head(case, dtype, rank)
    found = pf.linear_token_stats(
        hidden,
        weight,
        case.targets,
        bias=bias,
        softcap=3.0,
        ref_hidden=case.ref_hidden.to(dtype),
        ref_weight=sliced(case.ref_weight, rank, 0).to(dtype),
        mask=case.mask,
        chunk_size=4,
        backend=backend,
        **group_of(rank),
    )
    assert found.kl is not None
    loss = (case.tokens["advantages"] * (found.logprobs - 0.7 * found.entropy + 0.3 * found.kl)).sum()
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    return [*(x.detach() for x in found), grads[0]], list(grads[1:])


def linear_policy(config: pf.PolicyLossConfig, chunk_size: int | None, frozen: bool = False) -> Run:
    """linear_policy_loss."""

    def run(case: Case, dtype: torch.dtype, backend: str, rank: int | None) -> tuple[list[Tensor], list[Tensor]]:
        hidden, weight, bias = head(case, dtype, rank)
        logprobs = torch.log_softmax(torch.nn.functional.linear(case.hidden, case.weight, case.bias), -1)
        old = logprobs.gather(-1, case.targets[..., None])[..., 0] + 0.3 * case.tokens["advantages"]
        tokens = {name: x.to(dtype) for name, x in {**case.tokens, "old_logprobs": old.to(dtype)}.items()}
        options: dict[str, Any] = {"config": config, "backend": backend, "chunk_size": chunk_size, **group_of(rank)}
        if config.kl_estimator == "full":
            options["ref_hidden"] = case.ref_hidden.to(dtype)
            options["ref_weight"] = sliced(case.ref_weight, rank, 0).to(dtype)
        elif config.kl_coef:
            options["ref_logprobs"] = tokens["old_logprobs"] - 0.2
        if frozen:
            weight, bias = weight.detach(), bias.detach()
        out = pf.linear_policy_loss(hidden, weight, case.targets, mask=case.mask, bias=bias, **tokens, **options)
        leaves = [x for x in (hidden, weight, bias) if x.requires_grad]
        whole, *mine = torch.autograd.grad(2 * out.loss, leaves)
        assert out.per_token is not None
        return [out.loss.detach(), *out.metrics.values(), *out.per_token[:2], whole], mine

    return run


RUNS: dict[str, Run] = {
    "stats": stats,
    "token": policy(TOKEN),
    "plain": policy(PLAIN),
    "sequence, exact KL": policy(FULL),
    "packed": policy(FULL, packed=True),
    "inplace": policy(TOKEN, inplace=True),
    "linear stats": linear_stats,
    "linear, by tiles": linear_policy(TOKEN, 4),
    "linear, one tile": linear_policy(TOKEN, None),
    "linear, sequence weights": linear_policy(PLAIN, 4),
    "linear, sequence": linear_policy(FULL, 4),
    "linear, frozen": linear_policy(TOKEN, 4, frozen=True),
}


# The interpreter is slow; what surrounds the kernels is the same on every backend.
INTERPRETED_RUNS = ("stats", "sequence, exact KL", "linear stats", "linear, by tiles")


def check(where: str, ours: Tensor, truth: Tensor, one: Tensor) -> None:
    """An error at most RTOL, of the largest value and at least of 1, above twice that of one process; inf as inf."""
    assert (ours.shape, ours.dtype) == (one.shape, one.dtype), where
    finite, allowed = truth.isfinite(), RTOL[ours.dtype] * max(1.0, truth[truth.isfinite()].abs().max().item())
    assert torch.equal(ours.double()[~finite], truth[~finite]), where
    error, of_one = ((x.double() - truth)[finite].abs().max().item() for x in (ours, one))
    assert error <= allowed + 2 * of_one, f"{where}: error {error}, of one process {of_one}, allowed {allowed}"


def compare(rank: int) -> None:
    """Each rank compares all that it has whole, and its slices of the gradients, with one process in float64."""
    dtypes = (torch.float32,) if INTERPRETED else tuple(RTOL)
    for backend, dtype in cases_under_test("token_stats", dtypes):
        case = rounded(make_case(), dtype)
        for name, run in RUNS.items():
            if INTERPRETED and name not in INTERPRETED_RUNS:
                continue
            truth, of_one = run(case, torch.float64, "torch", None), run(case, dtype, backend, None)
            ours, mine = run(case, dtype, backend, rank)
            where = f"{name}, {backend}, {dtype}"
            for i, results in enumerate(zip(ours, truth[0], of_one[0], strict=True)):
                check(f"{where}, result {i}", *results)
            for x, *others in zip(mine, truth[1], of_one[1], strict=True):
                dim = -1 if others[0].shape[-1] == V else 0
                check(f"{where}, gradient", x, *(sliced(y, rank, dim) for y in others))


@contextmanager
def reductions() -> Iterator[list[str]]:
    """The kinds of the reductions that are made, in order."""
    found: list[str] = []
    plain = dist.all_reduce

    def counted(x: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        found.append("MAX" if op == dist.ReduceOp.MAX else "SUM")
        return plain(x, op, group)

    with mock.patch.object(dist, "all_reduce", counted):
        yield found


def count(rank: int) -> None:
    """A SUM for the sizes, one MAX and one SUM for all statistics; a last SUM for the gradient of the hidden states."""
    case, backend = make_case(), backends_under_test("policy_loss")[-1]
    for name, expected in (("token", ["SUM", "MAX", "SUM"]), ("linear, one tile", ["SUM", "MAX", "SUM", "SUM"])):
        with reductions() as found:
            RUNS[name](case, torch.float32, backend, rank)
        assert found == expected, (name, found)


def refuse(rank: int) -> None:
    """What does not fit is refused on every rank, before anybody waits."""
    case, world = make_case(), dist.group.WORLD
    assert world is not None
    logits = sliced(case.logits, rank, -1).float()
    with raises_exactly("token_stats: expected group to be a torch.distributed.ProcessGroup, got str"):
        pf.token_stats(logits, case.targets, group="tp")  # type: ignore[arg-type]
    with raises_exactly(f"token_stats: expected targets in [0, {V}) where mask is True, got {V}"):
        pf.token_stats(logits, torch.full_like(case.targets, V), group=world)
    with raises_exactly("token_stats: expected as many rows on every rank of group, got [15, 10]"):
        rows = slice(None) if rank == 0 else slice(2)
        pf.token_stats(logits[rows], case.targets[rows], group=world)
    with (
        FakeTensorMode() as mode,
        raises_exactly("policy_loss: expected group=None under torch.compile and tracing, got a group"),
    ):
        fake = mode.from_tensor(logits), mode.from_tensor(case.targets)
        pf.policy_loss(*fake, None, mode.from_tensor(case.tokens["advantages"]), None, group=world)


def a_target_that_no_rank_has_is_nan(rank: int) -> None:
    """As in one process where the value cannot be checked, which is on a GPU."""
    case, world = make_case(), dist.group.WORLD
    assert world is not None
    shard = VocabShard("token_stats", world, SIZES[rank], case.logits)
    targets = shard.local(torch.tensor([[V, 0, V - 1, -1]]), torch.tensor([[False, True, True, False]]))
    assert targets.tolist() == [[-2, 0, -1, -2] if rank == 0 else [-2, -1, SIZES[1] - 1, -2]]
    logits = sliced(case.logits, rank, -1)[:1, :4]
    found = shard.stats(RowInputs(logits, targets, None, None, 1.0), True, "torch")
    assert found.logprobs.isnan().tolist() == [[True, False, False, True]]


def one_rank(rank: int, store: str) -> None:
    if INTERPRETED:
        interpreter.repair()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    compare(rank)
    count(rank)
    refuse(rank)
    a_target_that_no_rank_has_is_nan(rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["triton" if INTERPRETED else "torch and native"])
def test_two_slices_are_the_whole_vocabulary(tmp_path: Path, backend: str) -> None:
    multiprocessing.set_forkserver_preload([__name__])  # imported once
    mp.start_processes(one_rank, (str(tmp_path / "store"),), nprocs=WORLD, start_method="forkserver")
