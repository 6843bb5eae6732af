"""The launchers of the extension's CUDA kernels; they neither wait for the device nor read from it."""

import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._backends.native.gae import dtype_code, gae_arguments


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
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    bootstrap = None if bootstrap is None else bootstrap.to(torch.float32).contiguous()
    results = (
        torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device),
        torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device),
    )
    arguments = gae_arguments(rewards, values, cu_seqlens, mask, bootstrap, dones, gamma, lam, mask_mode, results)
    extension.gae_cuda(
        arguments,
        rewards_dtype=dtype_code(rewards.dtype),
        values_dtype=dtype_code(values.dtype),
        device=rewards.device.index,
        stream=torch.cuda.current_stream(rewards.device).cuda_stream,
    )
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
    """Advantages and returns of [B, T] sequences in float32, bfloat16 or float16, of any strides."""
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
