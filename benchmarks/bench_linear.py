"""The fused linear head against eager torch, torch.compile, only the matrix products, and the peers that are there.

Peers run where they can be imported: liger-kernel (chunked GRPO loss), cut-cross-entropy (its log-probabilities under
the same loss) and TRL's selective_log_softmax (on materialized logits). None of them has an entropy bonus.
"""

import contextlib
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import ppo_fast
from benchmarks import harness
from tests import eager

BACKENDS = [b for b in ("native", "triton") if ppo_fast.backends()["linear_policy_loss"].get(b) == "ok"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# rows x hidden size x vocabulary
SHAPES = {"1024x512x32000": (1024, 512, 32000), "2048x256x32000": (2048, 256, 32000)}
if harness.DEVICE == "cuda":
    SHAPES = {"8192x4096x128256": (8192, 4096, 128256), "8192x3584x152064": (8192, 3584, 152064)}
if harness.SMOKE:
    SHAPES = {"16x8x100": (16, 8, 100)}
PRODUCTS = "matrix products only"
CLIP, KL_COEF = 0.2, 0.05


def imported(**modules: str) -> dict[str, Any]:
    """The peers' modules by name, without those that are not installed or miss something they need."""
    found = {}
    for name, module in modules.items():
        with contextlib.suppress(ImportError):
            found[name] = importlib.import_module(module)
    return found


MODULES = imported(liger="liger_kernel.chunked_loss", cce="cut_cross_entropy", trl="trl.trainer.utils")
PEERS = {"liger": "liger-kernel", "cce": "cut-cross-entropy", "trl": "trl"}


class Case:
    """One shape and variant: inputs and contenders.

    Variants: "entropy" (clip, k3 KL, entropy bonus), "no entropy", "frozen" (that of entropy, with no gradient of the
    weight) and "scoring": log-probabilities without gradient.
    """

    def __init__(self, shape: str, dtype: str, variant: str) -> None:
        N, D, V = SHAPES[shape]
        generator = torch.Generator(harness.DEVICE).manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=harness.DEVICE)

        self.variant, self.dtype = variant, DTYPES[dtype]
        self.hidden, self.weight = randn(N, D).to(self.dtype), (3 * randn(V, D) / D**0.5).to(self.dtype)
        self.targets = torch.randint(0, V, (N,), generator=generator, device=harness.DEVICE)
        with torch.no_grad():
            logprobs = ppo_fast.linear_token_stats(self.hidden, self.weight, self.targets).logprobs
        self.rows = logprobs + 0.2 * randn(N), randn(N), harness.mask(randn(N))  # old_logprobs, advantages, mask
        self.ref_logprobs = logprobs + 0.2 * randn(N)
        entropy = 0.01 if variant in ("entropy", "frozen") else 0.0
        self.config = ppo_fast.PolicyLossConfig(ent_coef=entropy, kl_coef=KL_COEF, kl_estimator="k3")
        self.moved = 2 * (self.hidden.nbytes + self.weight.nbytes)
        self.compiled = harness.compiled(self._eager)

    def value(self, contender: str, hidden: Tensor, weight: Tensor, n: int) -> Tensor:
        """The loss, or the log-probabilities, of the first ``n`` rows."""
        named = {"eager": self._eager, "torch.compile": self.compiled, "liger-kernel": self._liger}
        named |= {"cut-cross-entropy": self._cce, "trl": self._trl}
        if contender in named:
            return named[contender](hidden, weight, n)
        return self._ours(contender, hidden, weight, n)

    def _eager(self, hidden: Tensor, weight: Tensor, n: int) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        if self.variant == "scoring":
            logprobs = torch.log_softmax(eager._upcast(logits), -1)
            return logprobs.gather(-1, self.targets[:n, None])[:, 0]
        old, advantages, mask = (x[:n] for x in self.rows)
        inputs = (logits, self.targets[:n], old, advantages, mask)
        return eager.policy_loss(*inputs, config=self.config, ref_logprobs=self.ref_logprobs[:n])

    def _ours(self, backend: str, hidden: Tensor, weight: Tensor, n: int) -> Tensor:
        targets = self.targets[:n]
        if self.variant == "scoring":
            return ppo_fast.linear_token_stats(hidden, weight, targets, backend=backend).logprobs
        old, advantages, mask = (x[:n] for x in self.rows)
        reference = {"ref_logprobs": self.ref_logprobs[:n]}
        out = ppo_fast.linear_policy_loss(
            hidden, weight, targets, old, advantages, mask, config=self.config, backend=backend, **reference
        )
        return out.loss

    def _loss_of(self, logprobs: Tensor, n: int) -> Tensor:
        """The same loss around a peer's log-probabilities."""
        if self.variant == "scoring":
            return logprobs
        old, advantages, mask = (x[:n] for x in self.rows)
        r = (logprobs - old).exp()
        objective = torch.minimum(r * advantages, r.clamp(1 - CLIP, 1 + CLIP) * advantages)
        kl = ppo_fast.kl_estimate(logprobs, self.ref_logprobs[:n], "k3")
        return ppo_fast.masked_mean(KL_COEF * kl - objective, mask)

    def _cce(self, hidden: Tensor, weight: Tensor, n: int) -> Tensor:
        options = {} if harness.DEVICE == "cuda" else {"impl": "torch_compile"}
        loss = MODULES["cce"].linear_cross_entropy(hidden, weight, self.targets[:n], reduction="none", **options)
        return self._loss_of(-loss.float(), n)

    def _trl(self, hidden: Tensor, weight: Tensor, n: int) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight)
        return self._loss_of(MODULES["trl"].selective_log_softmax(logits, self.targets[:n]).float(), n)

    def _liger(self, hidden: Tensor, weight: Tensor, n: int) -> Tensor:
        old, advantages, mask = (x[:n, None] for x in self.rows)
        loss = MODULES["liger"].LigerFusedLinearGRPOLoss(
            beta=KL_COEF, loss_type="bnpo", use_ref_model=True, chunk_size=256, compiled=not harness.SMOKE
        )
        inputs = (hidden[:, None], weight, self.targets[:n, None], mask.float(), advantages[:, 0])
        reference = {"ref_per_token_logps": self.ref_logprobs[:n, None], "old_per_token_logps": old}
        return loss(*inputs, **reference)[0]

    def run(self, contender: str, n: int | None = None) -> tuple[Tensor, ...]:
        """The gradients of hidden and weight, or the log-probabilities, of the first ``n`` rows."""
        n = len(self.targets) if n is None else n
        if contender == PRODUCTS:
            return self._products()
        return self._answer(contender, self.hidden[:n], self.weight, n)

    def _answer(self, contender: str, hidden: Tensor, weight: Tensor, n: int) -> tuple[Tensor, ...]:
        if self.variant == "scoring":
            with torch.no_grad():
                return (self.value(contender, hidden, weight, n),)
        leaves = [hidden.detach().requires_grad_()]
        if self.variant == "frozen":
            return torch.autograd.grad(self.value(contender, *leaves, weight, n), leaves)
        leaves.append(weight.detach().requires_grad_())
        return torch.autograd.grad(self.value(contender, *leaves, n), leaves)

    @property
    def flops(self) -> int:
        """Operations of the products that every contender needs."""
        products = {"scoring": 1, "frozen": 2}.get(self.variant, 3)
        return 2 * products * self.hidden.shape[0] * self.weight.numel()

    def _products(self) -> tuple[Tensor, ...]:
        """The products that every contender needs, on all rows at once."""
        logits = self.hidden @ self.weight.T
        if self.variant == "scoring":
            return (logits,)
        if self.variant == "frozen":
            return (logits @ self.weight,)
        return logits @ self.weight, logits.T @ self.hidden

    def error(self, contender: str, few: int = 64) -> float:
        """The largest relative error over the first rows against eager float64."""
        if contender == PRODUCTS:
            return 0.0
        few = min(few, len(self.targets))
        truth = self._answer("eager", self.hidden[:few].double(), self.weight.double(), few)
        return max(harness.relative_error(a, t) for a, t in zip(self.run(contender, few), truth, strict=True))


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


CASES = [(shape, dtype, "entropy") for shape in SHAPES for dtype in DTYPES]
CASES += [(next(iter(SHAPES)), dtype, variant) for dtype in DTYPES for variant in ("no entropy", "scoring")]
OWN = ["eager", "torch.compile", PRODUCTS, *BACKENDS]
RUNS = [pytest.param(case, name, id="-".join((*case, name))) for case in CASES for name in OWN]
RUNS += [
    pytest.param(case, PEERS[peer], id="-".join((*case, PEERS[peer])), marks=pytest.mark.peers)
    for case in CASES
    for peer in MODULES
    if case[2] == "no entropy" or (case[2] == "scoring" and peer != "liger")
]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("case", "contender"), RUNS, indirect=["case"], scope="module")
def test_linear(benchmark: Any, case: Case, contender: str, request: pytest.FixtureRequest) -> None:
    shape, dtype, variant = request.node.callspec.params["case"]
    benchmark.group = f"{variant}, {shape} {dtype}"
    others = {name: lambda name=name: case.run(name) for name in ("eager", "torch.compile", PRODUCTS)}
    harness.measure(
        benchmark,
        lambda: case.run(contender),
        others if contender in BACKENDS else {},
        contender=contender,
        moved=case.moved,
        error=case.error(contender),
        # A bfloat16 logit of 8 is off by up to 0.03, and so is the log-ratio: some tokens change sides of the clip.
        allowed_error=1e-4 if dtype == "float32" else 0.25,
        rounds=5,  # a second each
    )
