"""Per-token log-probability, entropy and exact KL from logits: ``token_logprobs``, ``token_stats``, ``entropy``.

One registered forward and one registered backward serve the three, and the backward serves every loss made of them:
it is affine in log pi and log ref, so a loss touches it only through per-row scalars.
"""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._backends.native import rows as native_rows
from ppo_fast.ops._backends.native import token_stats as native_token_stats
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.layout import as_bools, as_logits, as_rows
from ppo_fast.ops._core.results import TokenStats

for _op in ("token_logprobs", "token_stats", "entropy"):
    registry.register_public(_op, kernels="token_stats")
registry.register("token_stats", "torch", registry.Implementation(reference.token_stats))
registry.register("token_stats_backward", "torch", registry.Implementation(reference.token_stats_backward))
registry.register("token_stats", "triton", triton.implementation("token_stats", "token_stats"))
registry.register(
    "token_stats_backward", "triton", triton.implementation("token_stats_backward", "token_stats_backward")
)
registry.register("token_stats", "native", native_rows.implementation(native_token_stats.token_stats))
registry.register("token_stats_backward", "native", native_rows.implementation(native_token_stats.token_stats_backward))


def _launch(
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    want_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if targets is not None:
        checks.target_values("token_stats", targets, mask, logits.shape[-1])
    run = registry.implementation("token_stats", backend)
    return run(logits, targets, ref_logits, mask, temperature, want_entropy)


_token_stats = torch.library.custom_op("ppo_fast::token_stats", _launch, mutates_args=())


@_token_stats.register_fake
def _(
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    want_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def out(wanted: bool, dtype: torch.dtype) -> Tensor:
        return logits.new_empty(logits.shape[:-1] if wanted else (0,), dtype=dtype)

    # lse in float64: with a logit offset of 3e4 a float32 one, and every probability made with it, is off by 1e-3.
    dtype, has_ref = checks.accumulation_dtype(logits.dtype), ref_logits is not None
    lse, ref_lse = out(True, torch.float64), out(has_ref, torch.float64)
    return out(targets is not None, dtype), out(want_entropy, dtype), out(has_ref, dtype), lse, ref_lse


@torch.library.custom_op("ppo_fast::token_stats_backward", mutates_args=())
def token_stats_backward(
    g: Tensor | None,
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor,
    entropy: Tensor,
    kl: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    """The gradient of the logits from per-row upstream gradients of logprob, entropy and KL; None leaves one out."""
    run = registry.implementation("token_stats_backward", backend)
    return run(g, g_entropy, g_kl, logits, targets, ref_logits, mask, lse, ref_lse, entropy, kl, temperature)


@token_stats_backward.register_fake
def _(
    g: Tensor | None,
    g_entropy: Tensor | None,
    g_kl: Tensor | None,
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor,
    entropy: Tensor,
    kl: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, ref_logits, mask, ctx.temperature, _, ctx.backend = inputs
    _, entropy, kl, lse, ref_lse = output
    ctx.save_for_backward(logits, targets, ref_logits, mask, lse, ref_lse, entropy, kl)
    ctx.mark_non_differentiable(lse, ref_lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g: Tensor, g_entropy: Tensor, g_kl: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    checks.first_derivative("token_stats")
    logits, targets, ref_logits, mask, lse, ref_lse, entropy, kl = ctx.saved_tensors
    upstream = [x if x is None or x.numel() else None for x in (g, g_entropy, g_kl)]
    if all(x is None for x in upstream):
        return torch.zeros_like(logits, memory_format=torch.contiguous_format), *((None,) * 6)
    dlogits = token_stats_backward(
        *(None if x is None else x.contiguous() for x in upstream),
        logits,
        targets,
        ref_logits,
        mask,
        lse,
        ref_lse,
        entropy,
        kl,
        ctx.temperature,
        ctx.backend,
    )
    return dlogits, *((None,) * 6)


_token_stats.register_autograd(_backward, setup_context=_setup_context)


def _run(
    op: str,
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    want_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check, bring to [B, T, V], call the registered op, give back the shape of the targets."""
    checks.logits(op, "logits", logits)
    checks.reverse_mode(op, "logits", logits)
    shape = logits.shape[:-1]
    if targets is not None:
        checks.targets(op, targets, logits)
    checks.ref_logits(op, ref_logits, logits)
    checks.boolean(op, "mask", mask, "logits", logits, shape)
    checks.scale(op, "temperature", temperature)
    backend = registry.resolve(op, backend, logits.device, logits.dtype)
    ref = None if ref_logits is None else as_logits(ref_logits.detach())
    rows = None if targets is None else as_rows(targets, shape)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    run = _launch if not differentiable and registry.runs_directly(logits) else _token_stats
    logprobs, ent, kl, _, _ = run(
        as_logits(logits), rows, ref, as_bools(mask, shape), float(temperature), want_entropy, backend
    )
    return logprobs, ent, kl if ref is None else kl.view(shape)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Log-probability of each target: ``log_softmax(logits / temperature, -1)[target]``, nothing of size V kept.

    Equals ``torch.log_softmax(logits.float() / temperature, -1).gather(-1, targets[..., None])[..., 0]``.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64. ``logits[..., t, :]`` is the distribution that
            ``targets[..., t]`` was drawn from; shifting is the caller's.
        targets: [...], int32 or int64, in [0, V) where counted; anything elsewhere.
        mask: [...], bool, True = counts; None counts every position. Other rows are not read and give 0.
        temperature: in [1e-9, 1e9], divides the logits.
        backend: "auto" | "torch" | "triton" | "native"; a named backend runs or raises.

    Returns:
        [...], nats, float32 (float64 for float64 logits). The gradient comes back in the dtype of the logits.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; forward-mode differentiation. One sentence that
            names the argument.
        RuntimeError: a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> token_logprobs(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))[0, 0].exp().item()
        0.25
    """
    checks.tensor("token_logprobs", "targets", targets)
    logprobs, _, _ = _run("token_logprobs", logits, targets, None, mask, temperature, False, backend)
    return logprobs.view(logits.shape[:-1])


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability, entropy and exact KL(pi || ref) of every token in one pass over the vocabulary.

    With u = log_softmax(logits / temperature), w the same for the reference and p = exp(u):
    ``logprob = u[target]``, ``entropy = -sum p*u``, ``kl = sum p*(u - w)``. All three carry gradients to ``logits``.
    What float32 cannot hold is infinite, a KL from 3e38 / V on too.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64.
        targets: [...], int32 or int64.
        ref_logits: [..., V], any of these dtypes, without gradient; None: ``kl`` is None.
        mask: [...], bool, True = counts. Other rows are not read, return 0 and get zero gradient.
        temperature: in [1e-9, 1e9], divides both kinds of logits.
        backend: "auto" | "torch" | "triton" | "native".

    Returns:
        TokenStats(logprobs, entropy, kl), each [...], nats, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; forward-mode differentiation.
        RuntimeError: a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> stats = token_stats(torch.zeros(1, 4), torch.tensor([2]), ref_logits=torch.zeros(1, 4))
        >>> round(stats.entropy.item(), 4), stats.kl.item()
        (1.3863, 0.0)
    """
    checks.tensor("token_stats", "targets", targets)
    logprobs, ent, kl = _run("token_stats", logits, targets, ref_logits, mask, temperature, True, backend)
    shape = logits.shape[:-1]
    return TokenStats(logprobs.view(shape), ent.view(shape), None if ref_logits is None else kl)


def entropy(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Entropy of each row's distribution, ``-sum p*log p`` with p = softmax(logits / temperature), in nats.

    Equals ``torch.distributions.Categorical(logits=logits.float() / temperature).entropy()``, and stays right where
    logits are -inf.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64.
        mask: [...], bool, True = counts; other rows return 0 and get zero gradient.
        temperature: in [1e-9, 1e9].
        backend: "auto" | "torch" | "triton" | "native".

    Returns:
        [...], float32 (float64 for float64 logits), between 0 and ln V.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit; forward-mode differentiation.
        RuntimeError: a backward with ``create_graph=True``.

    Example:
        >>> import torch
        >>> round(entropy(torch.zeros(8)).item(), 4)
        2.0794
    """
    _, ent, _ = _run("entropy", logits, None, None, mask, temperature, True, backend)
    return ent.view(logits.shape[:-1])
