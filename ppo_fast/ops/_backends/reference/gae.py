"""Generalized advantage estimation as the plain recursion."""

import torch
from torch import Tensor

from ppo_fast.ops._core.checks import accumulation_dtype


def _recursion(
    rewards: Tensor,
    values: Tensor,
    counted: Tensor,
    done: Tensor,
    last: Tensor,
    bootstrap: Tensor,
    gamma: float,
    lam: float,
    mask_mode: str,
) -> tuple[Tensor, Tensor]:
    """A[t] = delta[t] + gamma*lam*A[t+1] over columns; at ``last`` a sequence ends: start from bootstrap."""
    rewards, values = torch.where(counted, rewards, 0.0), torch.where(counted, values, 0.0)
    advantages = torch.zeros_like(rewards, memory_format=torch.contiguous_format)
    adv, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = torch.where(last[:, t], bootstrap[:, t], next_value)
        adv = torch.where(last[:, t], 0.0, adv)
        delta = rewards[:, t] + gamma * torch.where(done[:, t], 0.0, next_value) - values[:, t]
        new_adv = delta + (gamma * lam) * torch.where(done[:, t], 0.0, adv)
        step = torch.ones_like(counted[:, t]) if mask_mode == "zero" else counted[:, t]
        adv = torch.where(step, new_adv, adv)
        next_value = torch.where(step, values[:, t], next_value)
        advantages[:, t] = torch.where(counted[:, t], adv, 0.0)
    return advantages, torch.where(counted, advantages + values, 0.0).contiguous()


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
    """delta[t] = r[t] + gamma*(1-done[t])*v[t+1] - v[t]; A[t] = delta[t] + gamma*lam*(1-done[t])*A[t+1]; R = A + v."""
    dtype = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    shape = rewards.shape
    if shape.numel() == 0:
        return rewards.new_zeros(shape, dtype=dtype), rewards.new_zeros(shape, dtype=dtype)
    none, all_ = rewards.new_zeros(shape, dtype=torch.bool), rewards.new_ones(shape, dtype=torch.bool)
    last = none.clone()
    last[:, -1] = True
    boot = rewards.new_zeros(shape, dtype=dtype)
    if bootstrap is not None:
        boot[:, -1] = bootstrap.to(dtype)
    return _recursion(
        rewards.to(dtype),
        values.to(dtype),
        all_ if mask is None else mask,
        none if dones is None else dones,
        last,
        boot,
        gamma,
        lam,
        mask_mode,
    )


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
    """The same recursion over packed [N] tokens, restarted at every sequence end; N steps, one at a time."""
    dtype = accumulation_dtype(torch.promote_types(rewards.dtype, values.dtype))
    N = rewards.shape[0]
    if N == 0:
        return rewards.new_zeros(0, dtype=dtype), rewards.new_zeros(0, dtype=dtype)
    none = rewards.new_zeros(1, N, dtype=torch.bool)
    counted = ~none if mask is None else mask[None]
    # An empty sequence has no last token: its slot is the extra column N.
    end = torch.where(cu_seqlens[1:] > cu_seqlens[:-1], cu_seqlens[1:] - 1, N).long()
    last = rewards.new_zeros(N + 1, dtype=torch.bool).index_fill(0, end, True)
    boot = rewards.new_zeros(N + 1, dtype=dtype)
    if bootstrap is not None:
        boot = boot.index_copy(0, end, bootstrap.to(dtype))
    advantages, returns = _recursion(
        rewards.to(dtype)[None],
        values.to(dtype)[None],
        counted,
        none if dones is None else dones[None],
        last[None, :N],
        boot[None, :N],
        gamma,
        lam,
        mask_mode,
    )
    return advantages[0], returns[0]
