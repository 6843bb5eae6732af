"""Per-token log-probability, entropy and exact KL from logits: ``token_logprobs``, ``token_stats``, ``entropy``.

One registered forward and one registered backward serve the three, and the backward serves every loss made of them:
it is affine in log pi and log ref, so a loss touches it only through per-row scalars.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._backends.native import rows as native_rows
from ppo_fast.ops._backends.native import token_stats as native_token_stats
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.inputs import RowGrads, RowInputs, given_grads
from ppo_fast.ops._core.layout import as_bools, as_logits, as_rows
from ppo_fast.ops._core.results import RowStats, TokenStats
from ppo_fast.ops._core.schema import grouped, schema, to_first
from ppo_fast.ops._core.vocab_shard import VocabShard

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


def _public_name(rows: RowInputs, want_entropy: bool) -> str:
    """The op that was called, for errors."""
    return "entropy" if rows.targets is None else "token_stats" if want_entropy else "token_logprobs"


def _launch(*arguments: Any) -> RowStats:
    """Checks what depends on values, then runs the backend."""
    *given, want_entropy, backend = arguments
    rows = RowInputs(*given)
    checks.target_values(_public_name(rows, want_entropy), rows.targets, rows.mask, rows.logits.shape[-1])
    return registry.implementation("token_stats", backend)(rows, want_entropy)


_token_stats = torch.library.custom_op(
    "ppo_fast::token_stats",
    mutates_args=(),
    schema=schema(RowInputs, "bool want_entropy, str backend", results=RowStats),
)(_launch)


@_token_stats.register_fake
def _(*arguments: Any) -> RowStats:
    *given, want_entropy, _ = arguments
    rows = RowInputs(*given)
    return empty_stats(rows.logits, rows.targets is not None, want_entropy, rows.ref_logits is not None)


def empty_stats(logits: Tensor, want_logprobs: bool, want_entropy: bool, want_kl: bool) -> RowStats:
    """Statistics without values, for tensors without data."""
    dtype, wide = checks.accumulation_dtype(logits.dtype), torch.float64

    def out(wanted: bool, dtype: torch.dtype) -> Tensor:
        return logits.new_empty(logits.shape[:-1] if wanted else (0,), dtype=dtype)

    return RowStats(
        out(want_logprobs, dtype), out(want_entropy, dtype), out(want_kl, dtype), out(True, wide), out(want_kl, wide)
    )


@torch.library.custom_op(
    "ppo_fast::token_stats_backward",
    mutates_args=(),
    schema=schema(RowGrads, RowInputs, RowStats, "Tensor? scale, str backend"),
)
def _token_stats_backward(*arguments: Any) -> Tensor:
    *given, scale, backend = arguments
    run = registry.implementation("token_stats_backward", backend)
    return run(*grouped(given, RowGrads, RowInputs, RowStats), scale=scale)


@_token_stats_backward.register_fake
def _(*arguments: Any) -> Tensor:
    *given, _, _ = arguments
    _, rows, _ = grouped(given, RowGrads, RowInputs, RowStats)
    return torch.empty_like(rows.logits, memory_format=torch.contiguous_format)


def token_stats_backward(
    grads: RowGrads, rows: RowInputs, stats: RowStats, backend: str, scale: Tensor | None = None
) -> Tensor:
    """The gradient of the logits from the gradients in the statistics of each row, all times ``scale`` []."""
    if registry.runs_directly(rows.logits):
        return registry.implementation("token_stats_backward", backend)(grads, rows, stats, scale=scale)
    filled = [stats.lse.new_empty(0) if x is None else x for x in stats]  # a policy loss leaves some out
    return _token_stats_backward(*grads, *rows, *filled, scale, backend)


def save_rows(ctx: Any, rows: RowInputs, *others: Tensor | None) -> None:
    """Save the rows and other tensors for :func:`saved_rows`."""
    logits, targets, ref_logits, mask, ctx.temperature = rows
    ctx.save_for_backward(logits, targets, ref_logits, mask, *others)


def saved_rows(ctx: Any) -> tuple[RowInputs, list[Tensor]]:
    """The rows that :func:`save_rows` saved, and the other tensors."""
    logits, targets, ref_logits, mask, *others = ctx.saved_tensors
    return RowInputs(logits, targets, ref_logits, mask, ctx.temperature), others


def _save(ctx: Any, rows: RowInputs, stats: RowStats, backend: str) -> None:
    ctx.backend = backend
    save_rows(ctx, rows, *stats)
    ctx.mark_non_differentiable(stats.lse, stats.ref_lse)
    ctx.set_materialize_grads(False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, _, backend = inputs
    _save(ctx, RowInputs(*given), RowStats(*output), backend)


def _backward(ctx: Any, logprobs: Tensor, entropy: Tensor, kl: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    rows, stats = saved_rows(ctx)
    checks.first_derivative(_public_name(rows, stats[1].numel() > 0))
    grads = given_grads(logprobs, entropy, kl)
    if grads.nothing:
        return to_first(ctx, torch.zeros_like(rows.logits, memory_format=torch.contiguous_format))
    return to_first(ctx, token_stats_backward(grads, rows, RowStats(*stats), ctx.backend))


_token_stats.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The registered op past the dispatcher, or that of a slice of the vocabulary."""

    @staticmethod
    def forward(
        ctx: Any, _: Tensor, rows: RowInputs, want_entropy: bool, backend: str, shard: VocabShard | None
    ) -> RowStats:
        stats = _run_directly(rows, want_entropy, backend, shard)
        _save(ctx, rows, stats, backend)
        return stats

    backward = staticmethod(_backward)


def _run_directly(rows: RowInputs, want_entropy: bool, backend: str, shard: VocabShard | None) -> RowStats:
    if shard is not None:
        return shard.stats(rows, want_entropy, backend)
    return _launch(*rows, want_entropy, backend)


def _forward(rows: RowInputs, want_entropy: bool, backend: str, shard: VocabShard | None) -> RowStats:
    """The registered op, or an eager form of it."""
    if not registry.runs_directly(rows.logits):
        return RowStats(*_token_stats(*rows, want_entropy, backend))
    if torch.is_grad_enabled() and rows.logits.requires_grad:
        return _Eager.apply(rows.logits, rows, want_entropy, backend, shard)
    return _run_directly(rows, want_entropy, backend, shard)


def _run(
    op: str,
    logits: Tensor,
    targets: Tensor | None,
    ref_logits: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    want_entropy: bool,
    backend: str,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check, bring to [B, T, V], run the op, give back the shape of the targets."""
    checks.logits(op, "logits", logits)
    checks.reverse_mode(op, "logits", logits)
    shape = logits.shape[:-1]
    if targets is not None:
        checks.targets(op, targets, logits)
    checks.ref_logits(op, ref_logits, logits)
    checks.boolean(op, "mask", mask, "logits", logits, shape)
    checks.scale(op, "temperature", temperature)
    backend = registry.resolve(op, backend, logits.device, logits.dtype)
    rows = RowInputs(
        as_logits(logits),
        None if targets is None else as_rows(targets, shape),
        None if ref_logits is None else as_logits(ref_logits.detach()),
        as_bools(mask, shape),
        float(temperature),
    )
    shard = None if group is None else VocabShard(op, group, logits.shape[-1], logits)
    if shard is not None and rows.targets is not None:
        rows = rows._replace(targets=shard.local(rows.targets, rows.mask))
    logprobs, ent, kl, _, _ = _forward(rows, want_entropy, backend, shard)
    return logprobs, ent, kl if ref_logits is None else kl.view(shape)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    group: ProcessGroup | None = None,
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
        group: the process group over whose ranks the vocabulary is split, each of which makes the call. Rank r passes
            the r-th slice of V, of any size; targets are ids of the whole vocabulary, and they and the mask are the
            same on every rank. The results are those of whole rows on every rank; a gradient is that of the rank's own
            logits. Not under ``torch.compile``. None: the logits are whole.

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
    logprobs, _, _ = _run("token_logprobs", logits, targets, None, mask, temperature, False, backend, group)
    return logprobs.view(logits.shape[:-1])


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logits: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    group: ProcessGroup | None = None,
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
        group: the process group over whose ranks the vocabulary is split, that of ``ref_logits`` in the same way, as in
            :func:`token_logprobs`.

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
    logprobs, ent, kl = _run("token_stats", logits, targets, ref_logits, mask, temperature, True, backend, group)
    shape = logits.shape[:-1]
    return TokenStats(logprobs.view(shape), ent.view(shape), None if ref_logits is None else kl)


def entropy(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Entropy of each row's distribution, ``-sum p*log p`` with p = softmax(logits / temperature), in nats.

    Equals ``torch.distributions.Categorical(logits=logits.float() / temperature).entropy()``, and stays right where
    logits are -inf.

    Args:
        logits: [..., V], float32, bfloat16, float16 or float64.
        mask: [...], bool, True = counts; other rows return 0 and get zero gradient.
        temperature: in [1e-9, 1e9].
        backend: "auto" | "torch" | "triton" | "native".
        group: the process group over whose ranks the vocabulary is split, as in :func:`token_logprobs`.

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
    _, ent, _ = _run("entropy", logits, None, None, mask, temperature, True, backend, group)
    return ent.view(logits.shape[:-1])
