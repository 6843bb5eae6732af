"""Peak memory of the linear ops beside their inputs and gradients, and the rule for the rows of a chunk."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast.ops import _linear_sweep
from ppo_fast.ops._linear_call import LinearCall
from tests.helpers import each_backend
from tests.ops.test_memory import peak_bytes

D, V = 16, 4096
# Numbers per row beside D of them: the results, their inputs and temporaries.
PER_ROW = 100


def inputs(N: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Everything trained, every row counted."""
    return {
        "hidden": torch.randn(N, D).to(dtype).requires_grad_(),
        "weight": torch.randn(V, D).to(dtype).requires_grad_(),
        "targets": torch.randint(V, (N,)),
    }


def gradients(out: Any, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Of the loss, or of the log-probabilities."""
    loss = out.loss if isinstance(out, pf.LossOutput) else out.logprobs.sum()
    return torch.autograd.grad(loss, (given["hidden"], given["weight"]))


def policy_loss(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Forward and backward with every term."""
    N = given["hidden"].shape[0]
    rows = {"old_logprobs": torch.full((N,), -8.0), "advantages": torch.ones(N), "mask": None}
    config = pf.PolicyLossConfig(ent_coef=0.1, kl_coef=0.1, kl_estimator="full" if "ref_hidden" in options else "k3")
    if "ref_hidden" not in options:
        options["ref_logprobs"] = rows["old_logprobs"]
    return gradients(pf.linear_policy_loss(**given, **rows, config=config, **options), given)


def token_stats(given: dict[str, Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Forward and backward of the log-probabilities."""
    return gradients(pf.linear_token_stats(**given, **options), given)


def bound(N: int, chunk: int) -> int:
    """A chunk of float32 logits, the weight's gradient in float32, the gradients handed out, and O(N*D)."""
    return 4 * (chunk * V + 2 * V * D + N * (3 * D + PER_ROW))


CHUNKS = {512: 256, 2048: 256, 3072: 384, 4096: 512, 8192: 512}


@pytest.mark.parametrize("backend", [b for b in ("native",) if pf.backends()["linear_policy_loss"][b] == "ok"])
@pytest.mark.parametrize("op", [policy_loss, token_stats])
@pytest.mark.parametrize("N", [512, 2048, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_does_not_grow_with_the_logits(
    backend: str, op: Callable[..., Any], N: int, dtype: torch.dtype
) -> None:
    given = inputs(N, dtype)
    op(given, backend=backend)
    assert peak_bytes(lambda: op(given, backend=backend)) <= bound(N, CHUNKS[N])


@pytest.mark.parametrize("backend", [b for b in ("native",) if pf.backends()["linear_policy_loss"][b] == "ok"])
@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"ref_hidden": True}, {"softcap": 5.0, "ref_hidden": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_for_softcap_and_reference_keep_within_the_same_memory(
    backend: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    N = 4096
    given = inputs(N, dtype)
    if "ref_hidden" in options:
        options = {**options, "ref_hidden": torch.randn(N, D).to(dtype)}
    policy_loss(given, backend=backend, **options)
    assert peak_bytes(lambda: policy_loss(given, backend=backend, **options)) <= bound(N, N // 8)


@each_backend("linear_token_stats")
def test_nothing_is_kept_without_gradients(backend: str) -> None:
    given = inputs(64)
    kept: list[pf.TokenStats] = []
    with torch.no_grad():
        kept.append(pf.linear_token_stats(**given, backend=backend))
    assert all(x is None or x.untyped_storage().nbytes() == 64 * 4 for x in kept[0])


def call(N: int, device: str, dtype: torch.dtype, words: int, **changes: Any) -> LinearCall:
    """A call of that size, without memory."""
    hidden = torch.empty(N, D, device="meta", dtype=dtype)
    weight = torch.empty(words, D, device="meta", dtype=dtype)
    given = LinearCall(hidden, weight, None, hidden, None, None, None, None, None, 1.0, None, "torch")
    return given._replace(**changes)


@pytest.mark.parametrize(("N", "chunk"), [*CHUNKS.items(), (1, 1), (255, 255), (0, 1), (300, 256)])
def test_the_rule_on_a_cpu(N: int, chunk: int) -> None:
    given = call(N, "cpu", torch.float32, V)
    assert _linear_sweep.chunk_rows(given, N, True) == _linear_sweep.chunk_rows(given, N, False) == chunk
    assert N < 2048 or chunk * 8 <= N
    assert _linear_sweep.chunk_rows(given._replace(chunk_size=7), N, True) == max(1, min(7, N))
