"""token_stats (log-probability, entropy, exact KL) against eager torch and torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from benchmarks import harness
from tests import eager

BACKENDS = [b for b in ("native", "triton") if ppo_fast.backends()["token_stats"].get(b) == "ok"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Case:
    """One shape: its inputs, the eager and compiled baselines, and what is asked of them."""

    def __init__(self, shape: str, dtype: str, what: str) -> None:
        V = harness.VOCABULARIES[shape]
        N = harness.rows(V)
        generator = torch.Generator(harness.DEVICE).manual_seed(0)

        def logits() -> Tensor:
            draw = torch.randn(N, V, generator=generator, device=harness.DEVICE)
            return (3 * draw).to(DTYPES[dtype])

        self.what, self.logits = what, logits()
        self.ref_logits = logits() if what == "exact KL" else None
        self.targets = torch.randint(0, V, (N,), generator=generator, device=harness.DEVICE)
        self.upstream = torch.randn(N, generator=generator, device=harness.DEVICE)
        passes = {"forward": 1, "exact KL": 2, "forward+backward": 3}[what]
        self.moved = passes * self.logits.nbytes
        self.compiled = harness.compiled(eager.token_stats)

    def stats(self, contender: str, logits: Tensor) -> tuple[Tensor | None, ...]:
        if contender == "eager":
            return eager.token_stats(logits, self.targets, self.ref_logits)
        if contender == "torch.compile":
            return self.compiled(logits, self.targets, self.ref_logits)
        return ppo_fast.token_stats(logits, self.targets, ref_logits=self.ref_logits, backend=contender)

    def run(self, contender: str) -> tuple[Tensor, ...]:
        """(logprobs, entropy[, kl]), or with a backward pass the gradient as well."""
        if self.what != "forward+backward":
            with torch.no_grad():
                return tuple(x for x in self.stats(contender, self.logits) if x is not None)
        logits = self.logits.detach().requires_grad_()
        logprobs, entropy, _ = self.stats(contender, logits)
        torch.autograd.backward([logprobs, entropy], [self.upstream, self.upstream])
        return logprobs, entropy, logits.grad

    def error(self, contender: str, few: int = 4) -> float:
        """The largest relative error of the first rows against eager float64."""
        ours = self.run(contender)
        logits = self.logits[:few].double().requires_grad_()
        ref_logits = None if self.ref_logits is None else self.ref_logits[:few].double()
        truth = [x for x in eager.token_stats(logits, self.targets[:few], ref_logits) if x is not None]
        if self.what == "forward+backward":
            upstream = self.upstream[:few].double()
            torch.autograd.backward(truth[:2], [upstream, upstream])
            truth.append(logits.grad)
        return max(harness.relative_error(a[:few], t) for a, t in zip(ours, truth, strict=True))


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


CASES = [
    *((shape, dtype, what) for shape in harness.VOCABULARIES for dtype in DTYPES for what in ("forward",)),
    *((shape, "float32", what) for shape in harness.VOCABULARIES for what in ("exact KL", "forward+backward")),
]


@pytest.mark.parametrize("case", CASES, ids=["-".join(c) for c in CASES], indirect=True, scope="module")
@pytest.mark.parametrize("contender", ["eager", "torch.compile", *BACKENDS])
def test_token_stats(benchmark: Any, case: Case, contender: str, request: pytest.FixtureRequest) -> None:
    shape, dtype, what = request.node.callspec.params["case"]
    N, V = case.logits.shape
    benchmark.group = f"{what}, {shape}, {N}x{V} {dtype}"
    others = {name: lambda name=name: case.run(name) for name in ("eager", "torch.compile")}
    allowed = 1e-4 if what != "forward+backward" or dtype == "float32" else 1e-2
    harness.measure(
        benchmark,
        lambda: case.run(contender),
        others if contender in BACKENDS else {},
        contender=contender,
        moved=case.moved,
        error=case.error(contender),
        allowed_error=allowed,
    )
