"""torch.library.opcheck of every registered op; torch.compile(fullgraph=True) equal to eager, values and gradients."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from tests.helpers import assert_same, backends_under_test
from tests.ops.examples import EXAMPLES, each_example, fresh_inputs, run, upstream

OPS = torch.ops.ppo_fast


@pytest.fixture(autouse=True)
def _forget_compilations() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits_of(*shape: int, transposed: bool = False) -> Tensor:
    """Logits that require a gradient; transposed: time-major in memory."""
    if transposed:
        B, T, V = shape
        return torch.randn(T, B, V).transpose(0, 1).detach().requires_grad_()
    return torch.randn(*shape, requires_grad=True)


MASK = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool)
TARGETS = torch.tensor([[0, -100, 4], [2, 3, -100]])


def stats_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of token_stats: all outputs, one at a time, strided, empty."""
    logits, ref = logits_of(2, 3, 5), torch.randn(2, 3, 5)
    yield logits, TARGETS, ref, MASK, 0.7, True, backend
    yield logits, TARGETS.int(), None, MASK, 1.0, False, backend
    yield logits, None, None, None, 1.0, True, backend
    yield logits_of(2, 3, 5, transposed=True), TARGETS, ref.transpose(0, 1).reshape(2, 3, 5), MASK, 0.7, True, backend
    yield logits_of(2, 7, 5)[:, 2:-2], TARGETS, ref, MASK, 0.7, True, backend
    yield logits_of(1, 0, 5), torch.zeros(1, 0, dtype=torch.long), None, None, 1.0, True, backend


def backward_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of token_stats_backward: all upstream gradients, one at a time."""
    rows = torch.randn(2, 3)
    for transposed in (False, True):
        logits, ref = logits_of(2, 3, 5, transposed=transposed).detach(), torch.randn(2, 3, 5)
        rows_of = (logits, TARGETS, ref, MASK, 0.7)
        common = (*rows_of, *OPS.token_stats(*rows_of, True, backend), None, backend)
        for upstream_ in ((rows, rows, rows), (rows, None, None), (None, rows, None), (None, None, rows)):
            yield *upstream_, *common


def policy_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of policy_loss: nothing optional, everything with a reference of either kind, packed."""
    one, rows, ref = torch.tensor(0.1), torch.randn(2, 3), torch.randn(2, 3, 5)
    plain = (math.inf, math.inf, math.inf, "token", "k3", "token-mean", "clip", backend)
    clipped = (0.2, 0.2, 2.0, "sequence", "k3", "seq-mean-token-mean", "clip", backend)
    full = (0.2, 0.2, 2.0, "sequence", "full", "seq-mean-token-sum", "cispo", backend)
    nothing = (None,) * 6
    yield logits_of(2, 3, 5), TARGETS.clamp(min=0), None, None, 1.0, None, rows, *nothing, None, *plain
    common = (rows, rows)
    yield logits_of(2, 3, 5), TARGETS, None, MASK, 0.7, *common, rows, rows, None, one, one, one, one, *clipped
    yield logits_of(2, 3, 5), TARGETS, ref, MASK, 0.7, *common, None, rows, None, one, one, one, one, *full
    flat, offsets = rows.view(1, 6), torch.tensor([0, 2, 2, 6])
    packed = (logits_of(1, 6, 5), TARGETS.view(1, 6), None, MASK.view(1, 6), 0.7, flat, flat, flat, flat, offsets)
    yield *packed, one, one, one, one, *clipped


def value_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of value_loss: plain, clipped, strided bf16."""
    rows = torch.randn(2, 3)
    yield logits_of(2, 3), rows, None, None, None, None, None, "token-mean", backend
    yield logits_of(2, 3), rows, MASK, rows, None, torch.tensor(4.0), 0.2, "seq-mean-token-mean", backend
    strided = torch.randn(3, 2).bfloat16().T.detach().requires_grad_()
    yield strided, rows, MASK, None, None, None, None, "token-mean", backend


def gae_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of gae: nothing optional, everything, time-major; then packed."""
    rewards, values, dones = torch.randn(2, 3), torch.randn(2, 3), ~MASK
    yield rewards, values, None, None, None, None, 1.0, 0.95, "carry", backend
    yield rewards.bfloat16(), values, None, MASK, torch.randn(2), dones, 0.9, 0.5, "zero", backend
    time_major, mask = torch.randn(3, 2).T, MASK.T.contiguous().T
    yield time_major, time_major, None, mask, None, ~mask, 0.9, 0.5, "carry", backend
    yield from gae_packed_arguments(backend)


def gae_packed_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of gae with cu_seqlens: nothing optional, everything, no token."""
    rewards, values, offsets = torch.randn(6), torch.randn(6), torch.tensor([0, 2, 2, 6])
    yield rewards, values, offsets, None, None, None, 1.0, 0.95, "carry", backend
    yield (
        rewards,
        values.bfloat16(),
        offsets.int(),
        MASK.flatten(),
        torch.randn(3),
        ~MASK.flatten(),
        0.9,
        0.5,
        "zero",
        backend,
    )
    yield rewards[:0], values[:0], offsets[:1], None, None, None, 1.0, 0.95, "carry", backend


def sample_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of sample_tokens: no filter, both, strided bf16, no row."""
    logits, keys = torch.randn(2, 3, 5), torch.arange(18).view(2, 3, 3)
    yield logits, keys, 1.0, None, None, backend
    yield torch.randn(3, 2, 5).bfloat16().transpose(0, 1), keys, 0.7, 2, 0.9, backend
    yield logits[:, :0], keys[:, :0], 1.0, None, None, backend


def linear_calls(backend: str) -> Iterator[tuple[Any, ...]]:
    """The arguments that the linear ops share: nothing optional, everything, strided and frozen."""
    hidden, weight, none = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True), (None,) * 4
    yield hidden, weight, None, TARGETS.clamp(min=0), *none, None, 1.0, None, False, backend
    bias, rest = torch.randn(5, requires_grad=True), (3.0, 0.7, 2, True, backend)
    yield hidden, weight, bias, TARGETS, MASK, torch.randn(6, 3), torch.randn(5, 3), torch.randn(5), *rest
    strided = torch.randn(4, 6).T, torch.randn(4, 5).T.detach().requires_grad_()
    yield *strided, None, TARGETS.int(), MASK, None, None, None, None, 1.0, 2, False, backend


def linear_backward_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of linear_token_stats_backward: all upstream gradients, one at a time."""
    rows = torch.randn(2, 3)
    for call in linear_calls(backend):
        call = tuple(x.detach() if isinstance(x, Tensor) else x for x in call)
        stats = OPS.linear_token_stats(*call)
        yield *call, True, True, call[2] is not None, rows, rows, rows if call[5] is not None else None, *stats
        yield *call, True, False, False, rows, None, None, *stats
        yield *call, False, True, False, None, rows, None, *stats


def linear_policy_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of linear_policy_loss: nothing optional, everything, with a frozen head."""
    one, rows = torch.tensor(0.1), torch.randn(2, 3)
    plain, everything, strided = linear_calls(backend)
    tail = (0.2, 0.2, 2.0)
    nothing = (None, rows, *(None,) * 7, math.inf, math.inf, math.inf, "token", "k3", "token-mean", "clip")
    yield *plain, True, True, False, *nothing
    full = (rows, rows, None, rows, None, one, one, one, one, *tail, "token", "full", "seq-mean-token-mean", "cispo")
    yield *everything, True, True, True, *full
    sequence = (rows, rows, rows, rows, None, one, one, one, one, *tail, "sequence", "k3", "seq-mean-token-sum", "clip")
    yield *strided, False, True, False, *sequence
    yield *(x.detach() if isinstance(x, Tensor) else x for x in plain), False, False, False, *nothing


def linear_scaling_arguments(backend: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of linear_policy_loss_backward."""
    yield torch.randn(5, 4), torch.tensor(0.5), torch.tensor(3.0), torch.empty(0, dtype=torch.bfloat16), backend


ARGUMENTS: dict[str, Callable[[str], Iterator[tuple[Any, ...]]]] = {
    "token_stats": stats_arguments,
    "token_stats_backward": backward_arguments,
    "policy_loss": policy_arguments,
    "linear_token_stats": linear_calls,
    "linear_token_stats_backward": linear_backward_arguments,
    "linear_policy_loss": linear_policy_arguments,
    "linear_policy_loss_backward": linear_scaling_arguments,
    "value_loss": value_arguments,
    "gae": gae_arguments,
    "sample_tokens": sample_arguments,
}
CASES = [(op, b) for op in ARGUMENTS for b in backends_under_test(op.removesuffix("_backward"))]


@pytest.mark.parametrize(("op", "backend"), CASES)
def test_opcheck(op: str, backend: str) -> None:
    """All four checks on one backend; the two that trace the op's autograd cannot tell one from another."""
    some = {} if backend == "native" else {"test_utils": ("test_schema", "test_faketensor")}
    for arguments in ARGUMENTS[op](backend):
        torch.library.opcheck(getattr(OPS, op), arguments, **some)


def test_every_registered_op_is_checked() -> None:
    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "ppo_fast::" in name
    }
    assert names == set(ARGUMENTS)


def gradients(results: dict[str, Tensor], name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached results, and the gradient in the example's leaf."""
    leaf = EXAMPLES[name].leaf
    grad = {} if leaf is None else {"grad": torch.autograd.grad(upstream(results), inputs[leaf])[0]}
    return {k: v.detach() for k, v in results.items()} | grad


# An op is one node of a graph, whatever its backend: all examples run on one, and those of unlike arguments on each.
COMPILED = ("token_stats", "policy_loss-packed", "linear_policy_loss", "value_loss", "gae_packed", "sample_tokens")


@pytest.mark.parametrize(
    ("name", "backend"), [c for c in each_example().args[1] if c[0] in COMPILED or c[1] in ("native", "plain")]
)
def test_fullgraph_equals_eager(name: str, backend: str) -> None:
    compiled = torch.compile(lambda inputs: run(name, backend, inputs), fullgraph=True, backend="aot_eager")
    ours, theirs = (
        f(x) for f, x in ((compiled, fresh_inputs(name)), (lambda i: run(name, backend, i), fresh_inputs(name)))
    )
    assert_same({k: v.detach() for k, v in ours.items()}, {k: v.detach() for k, v in theirs.items()})
    inputs, same_inputs = fresh_inputs(name), fresh_inputs(name)
    assert_same(
        gradients(compiled(inputs), name, inputs), gradients(run(name, backend, same_inputs), name, same_inputs)
    )


@pytest.mark.slow  # test_in_a_step compiles a loss by inductor
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_equals_eager() -> None:
    """All ops in one graph, so that one compilation covers them."""
    names = ("token_stats", "policy_loss", "value_loss", "gae-carry", "gae_packed")

    def everything(inputs: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {name: run(name, "auto", inputs[name]) for name in names}

    eager_inputs, inputs = ({name: fresh_inputs(name) for name in names} for _ in range(2))
    expected, results = everything(eager_inputs), torch.compile(everything, fullgraph=True)(inputs)
    for name in names:
        assert_same(
            {k: v.detach() for k, v in results[name].items()}, {k: v.detach() for k, v in expected[name].items()}
        )
    sum(upstream(results[n]) for n in names if EXAMPLES[n].leaf).backward()
    sum(upstream(expected[n]) for n in names if EXAMPLES[n].leaf).backward()
    for name in names:
        if leaf := EXAMPLES[name].leaf:
            assert_same(inputs[name][leaf].grad, eager_inputs[name][leaf].grad)


class Counter:
    """A compile backend that counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs += 1
        return module


def test_no_recompilation_when_the_length_or_a_tensor_coefficient_changes() -> None:
    counter = Counter()

    def loss(logits: Tensor, targets: Tensor, advantages: Tensor, coefficient: Tensor) -> Tensor:
        config = pf.PolicyLossConfig(ent_coef=coefficient, aggregation="seq-mean-token-mean")
        return pf.policy_loss(logits, targets, None, advantages, None, config=config).loss

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for T, coefficient in itertools.product((4, 5, 6, 9), (0.1, 0.2)):
        arguments = (torch.randn(2, T, 5), torch.zeros(2, T, dtype=torch.long), torch.randn(2, T))
        compiled(*arguments, torch.tensor(coefficient))
    # One for the first length, one that leaves the length open.
    assert counter.graphs == 2


def test_a_number_as_coefficient_is_right_at_every_value() -> None:
    logits, targets, advantages = torch.randn(2, 3, 5), TARGETS.clamp(min=0), torch.randn(2, 3)

    def loss(entropy: float, temperature: float) -> Tensor:
        config = pf.PolicyLossConfig(ent_coef=entropy, temperature=temperature)
        return pf.policy_loss(logits, targets, None, advantages, None, config=config).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for entropy, temperature in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.7)):
        assert_same(compiled(entropy, temperature), loss(entropy, temperature))


def test_gae_does_not_recompile_with_the_length() -> None:
    counter = Counter()
    compiled = torch.compile(lambda r, v: pf.gae(r, v), fullgraph=True, backend=counter)
    for T in (4, 5, 6, 9):
        rewards, values = torch.randn(2, T), torch.randn(2, T)
        assert_same(compiled(rewards, values), pf.gae(rewards, values))
    assert counter.graphs == 2
