"""What every op owes its caller: inputs untouched, repeatable bits, no uninitialized memory, no graph in metrics."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import INTERPRETED, assert_same
from tests.ops.examples import EXAMPLES, each_example, fresh_inputs, run, run_with_gradient


@functools.cache
def plain(name: str, backend: str) -> dict[str, Tensor]:
    """The results and the gradient of an example as it stands, computed once."""
    return run_with_gradient(name, backend, fresh_inputs(name))


@each_example()
def test_inputs_are_not_written(name: str, backend: str) -> None:
    inputs = fresh_inputs(name)
    run_with_gradient(name, backend, inputs)
    assert_same({k: v.detach() for k, v in inputs.items()}, EXAMPLES[name].inputs)
    assert all(v._version == fresh_inputs(name)[k]._version for k, v in inputs.items())


@each_example()
def test_two_runs_are_bitwise_equal(name: str, backend: str) -> None:
    assert_same(run_with_gradient(name, backend, fresh_inputs(name)), plain(name, backend))


class _Passes(TorchDispatchMode):
    """A mode that sees every op, as those that trace do, and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@each_example("token_stats", "policy_loss", "value_loss")
def test_the_registered_op_runs_where_somebody_traces_and_only_there(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, call = list[str](), CustomOpDef.__call__

    def recorded(self: CustomOpDef, *arguments: Any) -> Any:
        called.append(self._name)
        return call(self, *arguments)

    monkeypatch.setattr(CustomOpDef, "__call__", recorded)
    eager = run_with_gradient(name, backend, fresh_inputs(name))
    assert not called
    with _Passes():
        traced = run_with_gradient(name, backend, fresh_inputs(name))
    assert called[0] == name
    assert_same(traced, eager)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Deterministic mode fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@each_example()
def test_uninitialized_memory_never_shows(name: str, backend: str) -> None:
    expected = plain(name, backend)
    with poisoned_empty():
        assert torch.empty(3).isnan().all()
        poisoned = run_with_gradient(name, backend, fresh_inputs(name))
    assert_same(poisoned, expected)


FOREIGN = [(torch.float64, "meta"), (torch.bfloat16, "cpu")]


@contextmanager
def foreign_defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    """The process-wide defaults of dtype and device."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@each_example()
@pytest.mark.parametrize(("dtype", "device"), FOREIGN[: 1 if INTERPRETED else 2])
def test_defaults_of_the_process_change_nothing(name: str, backend: str, dtype: torch.dtype, device: str) -> None:
    """The device "meta" stands for "cuda": whatever is made on the default device is not on that of the inputs."""
    expected, inputs = plain(name, backend), fresh_inputs(name)
    with foreign_defaults(dtype, device):
        foreign = run_with_gradient(name, backend, inputs)
    assert_same(foreign, expected)


@each_example()
def test_no_grad_changes_no_value(name: str, backend: str) -> None:
    with torch.no_grad():
        without = run(name, backend, fresh_inputs(name))
    assert_same(without, {k: v for k, v in plain(name, backend).items() if k != "grad"})
    assert not any(x.requires_grad for x in without.values())


@each_example(*(name for name in EXAMPLES if not name.startswith("linear")))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16][: 1 if INTERPRETED else 2])
def test_autocast_changes_nothing(name: str, backend: str, dtype: torch.dtype) -> None:
    expected = plain(name, backend)
    with torch.autocast("cpu", dtype):
        inside = run_with_gradient(name, backend, fresh_inputs(name))
    assert_same(inside, expected)


@each_example()
def test_outputs_are_float32(name: str, backend: str) -> None:
    results = run(name, backend, fresh_inputs(name))
    tokens = results.pop("sample_tokens.tokens", None)
    assert tokens is None or tokens.dtype == torch.int64
    assert {x.dtype for x in results.values()} == {torch.float32}


@each_example(*(name for name in EXAMPLES if "_loss" in name))
def test_loss_and_metrics_are_scalars_and_only_the_loss_has_a_graph(name: str, backend: str) -> None:
    results = run(name, backend, fresh_inputs(name))
    scalars = {k: v for k, v in results.items() if "per_token" not in k}
    assert all(x.dim() == 0 for x in scalars.values())
    assert [k for k, v in results.items() if v.requires_grad] == [f"{name}.loss"]


@each_example(*(name for name in EXAMPLES if "policy_loss" in name))
def test_per_token_results_have_the_shape_of_the_targets(name: str, backend: str) -> None:
    inputs = fresh_inputs(name)
    results = run(name, backend, inputs)
    rows = {k.rpartition(".")[2]: v for k, v in results.items() if "per_token" in k}
    assert rows.keys() == {"logprobs", "entropy", "kl"}
    assert all(x.shape == inputs["targets"].shape and not x[~inputs["mask"]].any() for x in rows.values())


GARBAGE = [float("nan"), float("inf"), float("-inf")]


def _garbage(value: Tensor, mask: Tensor, first: int) -> Tensor:
    where = mask if value.dim() == mask.dim() else mask[..., None]
    if value.dtype == torch.bool:
        return torch.where(where, value, ~value)
    fillers = torch.tensor(GARBAGE).roll(first)[torch.arange(value.numel()) % 3].view_as(value)
    return torch.where(where, value, fillers if value.is_floating_point() else -100)


@each_example(*(name for name, example in EXAMPLES.items() if example.masked))
@pytest.mark.parametrize("first", [0] if INTERPRETED else [0, 1, 2])
def test_padding_is_invisible(name: str, backend: str, first: int) -> None:
    example = EXAMPLES[name]
    changes = {k: _garbage(example.inputs[k], example.inputs["mask"], first) for k in example.masked}
    got = run_with_gradient(name, backend, fresh_inputs(name, **changes))
    assert_same(got, plain(name, backend))
    if example.leaf is not None:
        assert not got["grad"][~example.inputs["mask"]].any()


# Without a clip the old values are ignored.
IGNORED = {"value_loss-packed": "old_values"}


@each_example()
def test_a_nan_that_counts_reaches_the_results(name: str, backend: str) -> None:
    """In every floating input, once at its last counted element: the loss and the gradient, or the values."""
    inputs = EXAMPLES[name].inputs
    for key, value in inputs.items():
        if not value.is_floating_point() or key == IGNORED.get(name):
            continue
        mask, poisoned = inputs.get("mask"), value.clone()
        per_token = mask is not None and value.shape[: mask.dim()] == mask.shape
        poisoned[tuple(mask.nonzero()[-1]) if per_token else -1] = torch.nan
        results = run_with_gradient(name, backend, fresh_inputs(name, **{key: poisoned}))
        if "_loss" in name:
            assert results[f"{name}.loss"].isnan(), key
            assert results["grad"].isnan().any(), key
        else:
            assert any(x.isnan().any() for k, x in results.items() if k != "grad"), key


@each_example(*(name for name, example in EXAMPLES.items() if example.masked))
def test_no_mask_means_every_position(name: str, backend: str) -> None:
    everything = torch.ones_like(EXAMPLES[name].inputs["mask"])
    full = run_with_gradient(name, backend, fresh_inputs(name, mask=everything))
    inputs = fresh_inputs(name)
    inputs["mask"] = None  # type: ignore[assignment]
    assert_same(run_with_gradient(name, backend, inputs), full)


@each_example(*(name for name, example in EXAMPLES.items() if example.masked))
def test_nothing_counted_gives_zeros(name: str, backend: str) -> None:
    nothing = torch.zeros_like(EXAMPLES[name].inputs["mask"])
    results = run_with_gradient(name, backend, fresh_inputs(name, mask=nothing))
    assert not any(x.any() for x in results.values())
