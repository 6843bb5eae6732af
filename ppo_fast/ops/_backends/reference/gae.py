"""Generalized advantage estimation as the plain recursion."""

import torch
from torch import Tensor

from ppo_fast.ops._core.checks import accumulation_dtype
from ppo_fast.ops._core.inputs import GaeInputs


def _recursion(
    rewards: Tensor, values: Tensor, counted: Tensor, done: Tensor, last: Tensor, bootstrap: Tensor, inputs: GaeInputs
) -> tuple[Tensor, Tensor]:
    """A[t] = delta[t] + gamma*lam*A[t+1] over columns; at ``last`` a sequence ends: start from bootstrap."""
    gamma, lam = inputs.gamma, inputs.lam
    rewards, values = torch.where(counted, rewards, 0.0), torch.where(counted, values, 0.0)
    advantages = torch.zeros_like(rewards, memory_format=torch.contiguous_format)
    adv, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = torch.where(last[:, t], bootstrap[:, t], next_value)
        adv = torch.where(last[:, t], 0.0, adv)
        delta = rewards[:, t] + gamma * torch.where(done[:, t], 0.0, next_value) - values[:, t]
        new_adv = delta + (gamma * lam) * torch.where(done[:, t], 0.0, adv)
        step = torch.ones_like(counted[:, t]) if inputs.mask_mode == "zero" else counted[:, t]
        adv = torch.where(step, new_adv, adv)
        next_value = torch.where(step, values[:, t], next_value)
        advantages[:, t] = torch.where(counted[:, t], adv, 0.0)
    return advantages, torch.where(counted, advantages + values, 0.0).contiguous()


def _ends(inputs: GaeInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(where a sequence has its last step, the bootstrap value there), each [B, T], or [1, N] of packed sequences."""
    rewards, cu_seqlens, bootstrap = inputs.rewards, inputs.cu_seqlens, inputs.bootstrap
    if cu_seqlens is None:
        last, boot = rewards.new_zeros(rewards.shape, dtype=torch.bool), rewards.new_zeros(rewards.shape, dtype=dtype)
        last[:, -1] = True
        if bootstrap is not None:
            boot[:, -1] = bootstrap.to(dtype)
        return last, boot
    N = rewards.shape[0]
    # An empty sequence has no last token: its slot is the extra column N.
    end = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[1:] - 1, N).long()
    last = rewards.new_zeros(N + 1, dtype=torch.bool).index_fill(0, end, True)
    boot = rewards.new_zeros(N + 1, dtype=dtype)
    if bootstrap is not None:
        boot = boot.index_copy(0, end, bootstrap.to(dtype))
    return last[None, :N], boot[None, :N]


def gae(inputs: GaeInputs) -> tuple[Tensor, Tensor]:
    """delta[t] = r[t] + gamma*(1-done[t])*v[t+1] - v[t]; A[t] = delta[t] + gamma*lam*(1-done[t])*A[t+1]; R = A + v.

    Packed sequences are one row, on which the recursion restarts at every end: N steps, one at a time.
    """
    rewards, values = inputs.rewards, inputs.values
    dtype, shape = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype)), rewards.shape
    if shape.numel() == 0:
        return rewards.new_zeros(shape, dtype=dtype), rewards.new_zeros(shape, dtype=dtype)
    last, boot = _ends(inputs, dtype)
    rows = last.shape
    counted = rewards.new_ones(rows, dtype=torch.bool) if inputs.mask is None else inputs.mask.view(rows)
    done = rewards.new_zeros(rows, dtype=torch.bool) if inputs.dones is None else inputs.dones.view(rows)
    advantages, returns = _recursion(
        rewards.to(dtype).view(rows), values.to(dtype).view(rows), counted, done, last, boot, inputs
    )
    return advantages.view(shape), returns.view(shape)
