"""Functions of TRL and verl against what the patches put in their place: the same call, before and after."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from ppo_fast import integrations

V = harness.VOCABULARIES["llama3"]
B = 10
T = max(1, harness.rows(V) // B)
K = 20
SEQUENCES = (8, 32) if harness.SMOKE else (512, 1024)  # of GAE and the losses


class Case(NamedTuple):
    """One function.

    ``inputs`` makes the tensors to differentiate and the other arguments; ``passes`` counts how often the first tensor
    is read or written at the least; ``truth`` is what the first result should be, in float64.
    """

    module: str
    function: str
    inputs: Callable[[torch.dtype], tuple[list[Tensor], dict[str, Any]]]
    truth: Callable[..., Tensor] | None
    passes: int


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same in every call."""
    generator = torch.Generator(harness.DEVICE).manual_seed(0)
    return torch.randn(shape, generator=generator, device=harness.DEVICE).to(dtype)


def logits_and(name: str | None, *last: int, gradient: bool = True) -> Callable[[torch.dtype], Any]:
    """Logits [B, T, V], and tokens [B, T, *last] under ``name``."""

    def make(dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
        tokens = (torch.arange(B * T * (*last, 1)[0], device=harness.DEVICE) * 7919 % V).view(B, T, *last)
        logits = draw(B, T, V, dtype=dtype).requires_grad_(gradient)
        return [logits], {} if name is None else {name: tokens}

    return make


def log_softmax_at(logits: Tensor, tokens: Tensor) -> Tensor:
    index = tokens if tokens.ndim == logits.ndim else tokens.unsqueeze(-1)
    return logits.double().log_softmax(-1).gather(-1, index).view(tokens.shape)


def entropy_of(logits: Tensor) -> Tensor:
    u = logits.double().log_softmax(-1)
    return -(u.exp() * u).sum(-1)


def rewards_and_values(_: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    mask = torch.ones(SEQUENCES, device=harness.DEVICE)
    names = {"token_level_rewards": draw(*SEQUENCES), "values": draw(*SEQUENCES) / 2, "response_mask": mask}
    return [], names | {"gamma": 0.99, "lam": 0.95}


TRL, VERL = "trl.trainer.utils", "verl.utils.torch_functional"
CASES = {
    "TRL selective_log_softmax": Case(TRL, "selective_log_softmax", logits_and("index"), log_softmax_at, 3),
    f"TRL selective_log_softmax, top {K}": Case(
        TRL, "selective_log_softmax", logits_and("index", K), log_softmax_at, 3
    ),
    "TRL entropy_from_logits, no gradient": Case(
        TRL, "entropy_from_logits", logits_and(None, gradient=False), entropy_of, 1
    ),
    "verl logprobs_from_logits": Case(VERL, "logprobs_from_logits", logits_and("labels"), log_softmax_at, 3),
    "verl entropy_from_logits": Case(VERL, "entropy_from_logits", logits_and(None), entropy_of, 3),
    "verl compute_gae_advantage_return": Case(
        "verl.trainer.ppo.core_algos", "compute_gae_advantage_return", rewards_and_values, None, 4
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RUNS = [
    pytest.param(name, dtype, contender, marks=pytest.mark.peers if name.startswith("verl") else ())
    for name, case in CASES.items()
    for dtype in DTYPES
    for contender in ("original", "ppo_fast")
    if importlib.util.find_spec(case.module.split(".")[0]) and ("gae" not in name or dtype == "float32")
]


def forward_backward(function: Callable[..., Any], leaves: list[Tensor], options: dict[str, Any]) -> Any:
    """The call, and the gradient of its sum where a leaf wants one."""
    result = function(*leaves, **options)
    if leaves and leaves[0].requires_grad:
        torch.autograd.grad(result.sum(), leaves)
    return result


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "dtype", "contender"), RUNS)
def test_function(benchmark: Any, name: str, dtype: str, contender: str) -> None:
    case = CASES[name]
    module = importlib.import_module(case.module)
    original = getattr(module, case.function)
    patch = integrations.patch_trl if case.module == TRL else integrations.patch_verl
    with patch() as report:
        ours = getattr(module, case.function)
        assert ours is not original
    leaves, options = case.inputs(DTYPES[dtype])
    shape = "x".join(map(str, leaves[0].shape if leaves else SEQUENCES))
    benchmark.group = f"{name}, {shape} {dtype}"

    runs = {
        "original": lambda: forward_backward(original, leaves, options),
        "ppo_fast": lambda: forward_backward(ours, leaves, options),
    }
    result = runs[contender]()
    if case.truth is None:
        found, truth = result[0], original(*leaves, **{k: _double(v) for k, v in options.items()})[0]
    else:
        found, truth = result, case.truth(*(leaf.detach() for leaf in leaves), *options.values())
    harness.measure(
        benchmark,
        runs[contender],
        {} if contender == "original" else {"original": runs["original"]},
        contender=contender,
        moved=case.passes * (leaves[0].nbytes if leaves else options["values"].nbytes),
        error=harness.relative_error(found, truth),
        allowed_error=1e-5 if dtype == "float32" else 0.05,  # TRL sums the entropy in bfloat16
    )
    assert not report.fallbacks
    if contender == "ppo_fast":
        assert report.calls.total()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) else value
