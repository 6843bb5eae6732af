"""policy_loss with all terms, forward and backward, against eager torch and torch.compile."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from benchmarks import harness
from tests import eager

BACKENDS = [b for b in ("native", "triton") if ppo_fast.backends()["policy_loss"].get(b) == "ok"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VARIANTS = ("k2 KL", "exact KL", "k2 KL, in place")


class Case:
    """One shape and variant of the loss: inputs and contenders."""

    def __init__(self, shape: str, dtype: str, variant: str) -> None:
        V = harness.VOCABULARIES[shape]
        N = harness.rows(V)
        generator = torch.Generator(harness.DEVICE).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=harness.DEVICE)

        self.variant = variant
        self.logits = (3 * randn(N, V)).to(DTYPES[dtype])
        self.targets = torch.randint(0, V, (N,), generator=generator, device=harness.DEVICE)
        logprobs, *_ = eager.token_stats(self.logits, self.targets)
        self.rows = (logprobs + 0.2 * randn(N), randn(N), harness.mask(randn(N)))  # old_logprobs, advantages, mask
        exact = variant == "exact KL"
        self.reference: dict[str, Tensor] = {"ref_logprobs": logprobs + 0.2 * randn(N)}
        if exact:
            self.reference = {"ref_logits": (self.logits + 0.2 * randn(N, V)).to(DTYPES[dtype])}
        estimator = "full" if exact else variant[:2]
        self.config = ppo_fast.PolicyLossConfig(ent_coef=0.01, kl_coef=0.05, kl_estimator=estimator)
        self.moved = (5 if exact else 3) * self.logits.nbytes
        self.compiled = harness.compiled(eager.policy_loss)

    def loss(self, contender: str, logits: Tensor, n: int | None = None) -> Tensor:
        """The loss of the first ``n`` rows, or of all."""
        old, advantages, mask = (x[:n] for x in self.rows)
        inputs = (logits, self.targets[:n], old, advantages, mask)
        reference = {name: x[:n] for name, x in self.reference.items()}
        if contender == "eager":
            return eager.policy_loss(*inputs, config=self.config, **reference)
        if contender == "torch.compile":
            return self.compiled(*inputs, config=self.config, **reference)
        inplace = "in place" in self.variant
        output = ppo_fast.policy_loss(*inputs, config=self.config, inplace=inplace, backend=contender, **reference)
        return output.loss

    def run(self, contender: str) -> Tensor:
        """The gradient of the logits. In place, each run overwrites them: same work, other numbers."""
        gradient: list[Tensor] = []
        logits = _Head.apply(self.logits.detach().requires_grad_(), gradient)
        self.loss(contender, logits).backward()
        return gradient[0]

    def error(self, contender: str, few: int = 4) -> float:
        """The relative error of the gradient's first rows against eager float64."""
        logits = self.logits[:few].double().requires_grad_()
        share = self.rows[2][:few].sum() / self.rows[2].sum()
        (self.loss("eager", logits, few) * share).backward()
        if self.variant != "k2 KL, in place" or contender not in BACKENDS:
            return harness.relative_error(self.run(contender)[:few], logits.grad)
        kept = self.logits.clone()
        error = harness.relative_error(self.run(contender)[:few], logits.grad)
        self.logits.copy_(kept)
        return error


class _Head(torch.autograd.Function):
    """Stands for the layer that made the logits: they are no leaf, and their gradient ends here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.gradient.append(grad)
        return None, None


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


CASES = [
    *((shape, "float32", variant) for shape in harness.VOCABULARIES for variant in VARIANTS),
    *((shape, "bfloat16", "k2 KL") for shape in ("llama3", "qwen2.5")),
]


@pytest.mark.parametrize("case", CASES, ids=["-".join(c) for c in CASES], indirect=True, scope="module")
@pytest.mark.parametrize("contender", ["eager", "torch.compile", *BACKENDS])
def test_policy_loss(benchmark: Any, case: Case, contender: str, request: pytest.FixtureRequest) -> None:
    shape, dtype, variant = request.node.callspec.params["case"]
    N, V = case.logits.shape
    benchmark.group = f"{variant}, {shape}, {N}x{V} {dtype}"
    others = {name: lambda name=name: case.run(name) for name in ("eager", "torch.compile")}
    harness.measure(
        benchmark,
        lambda: case.run(contender),
        others if contender in BACKENDS else {},
        contender=contender,
        moved=case.moved,
        error=case.error(contender),
        allowed_error=1e-4 if dtype == "float32" else 1e-2,
    )
