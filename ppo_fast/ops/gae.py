"""Generalized advantage estimation, padded and packed, as one reverse scan per sequence."""

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends import reference, triton
from ppo_fast.ops._backends.native import extension, gae_cuda
from ppo_fast.ops._backends.native import gae as gae_native
from ppo_fast.ops._core import checks, registry
from ppo_fast.ops._core.inputs import GaeInputs
from ppo_fast.ops._core.layout import as_rows, grid
from ppo_fast.ops._core.results import GaeResult
from ppo_fast.ops._core.schema import schema

MASK_MODES = ("carry", "zero")

registry.register_public("gae")
registry.register_public("gae_packed", kernels="gae")
registry.register("gae", "torch", registry.Implementation(reference.gae))
registry.register("gae", "triton", triton.implementation("gae", "gae"))
registry.register(
    "gae",
    "native",
    registry.Implementation(
        gae_native.gae,
        devices=("cpu",),
        auto_dtypes=(torch.float32, torch.bfloat16, torch.float64),
        unusable=extension.load_error,
    ),
)
registry.register(
    "gae",
    "cuda",
    registry.Implementation(
        gae_cuda.gae,
        devices=("cuda",),
        dtypes=(torch.float32, *registry.HALVES),
        unusable=extension.cuda_error,
    ),
)


def _launch(inputs: GaeInputs, backend: str) -> tuple[Tensor, Tensor]:
    """Checks what depends on values, then runs the backend."""
    checks.cu_seqlens_values("gae_packed", inputs.cu_seqlens, inputs.rewards.shape[0])
    return registry.implementation("gae", backend)(inputs)


@torch.library.custom_op("ppo_fast::gae", mutates_args=(), schema=schema(GaeInputs, "str backend", results=GaeResult))
def _gae(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, backend = arguments
    return _launch(GaeInputs(*given), backend)


@_gae.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    rewards, values, *_ = arguments
    dtype = checks.accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    return rewards.new_empty(rewards.shape, dtype=dtype), rewards.new_empty(rewards.shape, dtype=dtype)


def _run(op: str, inputs: GaeInputs, backend: str) -> tuple[Tensor, Tensor]:
    rewards = inputs.rewards
    backend = registry.resolve(op, backend, rewards.device, torch.promote_types(rewards.dtype, inputs.values.dtype))
    advantages, returns = _launch(inputs, backend) if registry.runs_directly(rewards) else _gae(*inputs, backend)
    return advantages, returns


def _check(
    op: str,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    bootstrap_shape: torch.Size,
    dones: Tensor | None,
    gamma: float,
    lam: float,
    mask_mode: str,
) -> None:
    checks.tensor(op, "values", values)
    checks.per_token(op, "values", values, "rewards", rewards, rewards.shape)
    checks.boolean(op, "mask", mask, "rewards", rewards, rewards.shape)
    checks.boolean(op, "dones", dones, "rewards", rewards, rewards.shape)
    checks.per_token(op, "bootstrap", bootstrap, "the sequences", rewards, bootstrap_shape)
    checks.unit_interval(op, "gamma", gamma)
    checks.unit_interval(op, "lam", lam)
    checks.one_of(op, "mask_mode", mask_mode, MASK_MODES)


def _as_matrix(x: Tensor) -> Tensor:
    """[..., T] as [B, T], without gradient. A call on the tensor takes longer than a short scan: none without need."""
    x = x.detach() if x.requires_grad else x
    return x if x.dim() == 2 else x.reshape(grid(x.shape))


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    dones: Tensor | None = None,
    mask_mode: str = "carry",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of padded sequences.

    With v[T] = bootstrap::

        delta[t] = r[t] + gamma*(1 - done[t])*v[t+1] - v[t]
        A[t] = delta[t] + gamma*lam*(1 - done[t])*A[t+1]          R[t] = A[t] + v[t]

    Args:
        rewards: [B, T] (any leading shape), float32, bfloat16, float16 or float64; any strides: ``rewards.T`` of a
            time-major tensor is read in place.
        values: the shape of ``rewards``, any of these dtypes.
        mask: bool, True = counts; None counts every step. What stands elsewhere, NaN too, has no effect.
        gamma: discount in [0, 1].
        lam: in [0, 1]; 0 gives the TD error, 1 the return minus the value.
        bootstrap: [B], the value after the last step; None: 0, the episode ended.
        dones: bool, the shape of ``rewards``: the episode ends after step t.
        mask_mode: "carry": a masked step passes the running advantage and next value through unchanged (tool or prompt
            tokens inside a response). "zero": rewards and values are 0 where masked, dones act as given.
        backend: "auto" | "torch" | "triton" | "native" | "cuda".

    Returns:
        (advantages, returns), each the shape of ``rewards``, float32 (float64 if an input is), 0 where masked,
        without gradient.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit.

    Example:
        >>> import torch
        >>> advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), lam=1.0)
        >>> advantages.tolist(), returns.tolist()
        ([[0.5, 0.5]], [[1.0, 1.0]])

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.
    """
    checks.floating("gae", "rewards", rewards)
    shape = rewards.shape
    if len(shape) == 0:
        raise ValueError("gae: expected rewards of shape [..., T], got []")
    _check("gae", rewards, values, mask, bootstrap, shape[:-1], dones, gamma, lam, mask_mode)
    inputs = GaeInputs(
        _as_matrix(rewards),
        _as_matrix(values),
        None,
        as_rows(mask, shape),
        None if bootstrap is None else bootstrap.detach().reshape(grid(shape)[0]),
        as_rows(dones, shape),
        float(gamma),
        float(lam),
        mask_mode,
    )
    advantages, returns = _run("gae", inputs, backend)
    return (advantages, returns) if len(shape) == 2 else (advantages.view(shape), returns.view(shape))


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
    dones: Tensor | None = None,
    mask_mode: str = "carry",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`gae` of sequences packed one after the other, without padding.

    Args:
        rewards: [N], float32, bfloat16, float16 or float64.
        values: [N].
        cu_seqlens: int32 or int64 [S + 1], rising from 0 to N; sequence s is ``[cu_seqlens[s], cu_seqlens[s + 1])``,
            which may be empty.
        mask: bool [N], True = counts.
        gamma: discount in [0, 1].
        lam: in [0, 1].
        bootstrap: [S], the value after each sequence's last step; None: 0.
        dones: bool [N].
        mask_mode: "carry" | "zero".
        backend: "auto" | "torch" | "triton" | "native" | "cuda".

    Returns:
        (advantages, returns), each [N], float32 (float64 if an input is), without gradient.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit.

    Example:
        >>> import torch
        >>> rewards, cu_seqlens = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 1, 3])
        >>> gae_packed(rewards, torch.zeros(3), cu_seqlens, lam=1.0)[0].tolist()
        [1.0, 2.0, 2.0]
    """
    op = "gae_packed"
    checks.floating(op, "rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"{op}: expected rewards of shape [N], got {list(rewards.shape)}")
    checks.tensor(op, "cu_seqlens", cu_seqlens)
    checks.cu_seqlens(op, cu_seqlens, "rewards", rewards, rewards.shape)
    sequences = torch.Size([cu_seqlens.shape[0] - 1])
    _check(op, rewards, values, mask, bootstrap, sequences, dones, gamma, lam, mask_mode)
    inputs = GaeInputs(
        rewards.detach(),
        values.detach(),
        cu_seqlens.contiguous(),
        mask,
        None if bootstrap is None else bootstrap.detach(),
        dones,
        float(gamma),
        float(lam),
        mask_mode,
    )
    return _run(op, inputs, backend)
