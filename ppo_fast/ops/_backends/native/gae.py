"""Launcher of GAE in C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops._backends.native.extension import extension
from ppo_fast.ops._core.inputs import GaeInputs
from ppo_fast.ops._core.results import GaeResult


def _matrix(x: Tensor | None) -> tuple[int, int, int]:
    """Address and strides of [B, T], or of packed [N], which has no sequence stride."""
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), x.stride(0) if x.dim() == 2 else 0, x.stride(-1)


def gae_arguments(inputs: GaeInputs, results: GaeResult) -> Any:
    """The call as the extension takes it. It holds addresses: the tensors must outlive the launch.

    Args:
        inputs: with a contiguous bootstrap of the dtype of the results.
        results: contiguous tensors that the launch writes.
    """
    rewards, cu_seqlens, bootstrap = inputs.rewards, inputs.cu_seqlens, inputs.bootstrap
    return extension.GaeArguments(
        rewards=_matrix(rewards),
        values=_matrix(inputs.values),
        mask=_matrix(inputs.mask),
        dones=_matrix(inputs.dones),
        bootstrap=0 if bootstrap is None else bootstrap.data_ptr(),
        cu_seqlens=0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        cu_seqlens_is_int64=cu_seqlens is not None and cu_seqlens.dtype == torch.int64,
        sequences=rewards.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1,
        steps=rewards.shape[-1],
        gamma=inputs.gamma,
        lam=inputs.lam,
        carry=inputs.mask_mode == "carry",
        advantages=results.advantages.data_ptr(),
        returns=results.returns.data_ptr(),
    )


def dtype_code(dtype: torch.dtype) -> object:
    return getattr(extension.Dtype, str(dtype).removeprefix("torch."))


def gae(inputs: GaeInputs) -> GaeResult:
    """Advantages and returns, of inputs of any strides."""
    rewards, values, bootstrap = inputs.rewards, inputs.values, inputs.bootstrap
    dtype = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
    if rewards.dtype != dtype or values.dtype != dtype:
        inputs = inputs._replace(rewards=rewards.to(dtype), values=values.to(dtype))
    if bootstrap is not None:
        inputs = inputs._replace(bootstrap=bootstrap.to(dtype).contiguous())
    results = GaeResult(
        torch.empty(rewards.shape, dtype=dtype, device="cpu"),
        torch.empty(rewards.shape, dtype=dtype, device="cpu"),
    )
    extension.gae_cpu(gae_arguments(inputs, results), dtype=dtype_code(dtype), threads=torch.get_num_threads())
    return results
