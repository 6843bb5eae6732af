"""Launchers of GAE in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension


def _matrix(x: Tensor | None) -> tuple[int, int, int]:
    """Address and strides of [B, T], or of packed [N], which has no sequence stride."""
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), x.stride(0) if x.dim() == 2 else 0, x.stride(-1)


def gae_arguments(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    dones: Tensor | None,
    gamma: float,
    lam: float,
    mask_mode: str,
    results: tuple[Tensor, Tensor],
) -> Any:
    """The call as the extension takes it. It holds addresses: the tensors must outlive the launch.

    Args:
        cu_seqlens: contiguous int32 or int64 [S + 1] for packed [N] inputs, None for [B, T].
        bootstrap: contiguous, of the dtype of the results.
        results: advantages and returns, contiguous.
    """
    return extension.GaeArguments(
        rewards=_matrix(rewards),
        values=_matrix(values),
        mask=_matrix(mask),
        dones=_matrix(dones),
        bootstrap=0 if bootstrap is None else bootstrap.data_ptr(),
        cu_seqlens=0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        cu_seqlens_is_int64=cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        sequences=rewards.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1,
        steps=rewards.shape[-1],
        gamma=gamma,
        lam=lam,
        carry=mask_mode == "carry",
        advantages=results[0].data_ptr(),
        returns=results[1].data_ptr(),
    )


def dtype_code(dtype: torch.dtype) -> object:
    return getattr(extension.Dtype, str(dtype).removeprefix("torch."))


def _gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    dones: Tensor | None,
    gamma: float,
    lam: float,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
    rewards, values = rewards.to(dtype), values.to(dtype)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.to(dtype).contiguous()
    advantages = torch.empty(rewards.shape, dtype=dtype, device="cpu")
    results = advantages, torch.empty_like(advantages)
    arguments = gae_arguments(rewards, values, cu_seqlens, mask, bootstrap, dones, gamma, lam, mask_mode, results)
    extension.gae_cpu(arguments, dtype=dtype_code(dtype), threads=torch.get_num_threads())
    return results


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    dones: Tensor | None,
    gamma: float,
    lam: float,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of [B, T] sequences, of any strides."""
    return _gae(rewards, values, None, mask, bootstrap, dones, gamma, lam, mask_mode)


def gae_packed(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    dones: Tensor | None,
    gamma: float,
    lam: float,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of packed [N] sequences."""
    return _gae(rewards, values, cu_seqlens, mask, bootstrap, dones, gamma, lam, mask_mode)
