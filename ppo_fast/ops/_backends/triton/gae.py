"""Generalized advantage estimation as a reverse associative scan, for CUDA machines without the extension.

A step maps what the step after it hands back, (advantage, next value), to its own:
advantage' = a * advantage + b * next_value + c;  next_value' = next_value where the step passes, else its value.
Two maps compose to such a map, so a block of steps is one scan, and blocks follow each other from the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppo_fast.ops._backends.triton import tuning
from ppo_fast.ops._backends.triton.device import on_device_of
from ppo_fast.ops._core.inputs import GaeInputs


@triton.jit
def damped(factor, x):
    """factor * x, where a factor of 0 (an episode's end) also stops an infinite or NaN x."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def compose(a1, b1, c1, value1, passes1, a2, b2, c2, value2, passes2):
    """The map of steps 1 followed, towards the start of the sequence, by steps 2."""
    a = a2 * a1
    b = a2 * b1 + tl.where(passes1, b2, 0.0)
    c = damped(a2, c1) + tl.where(passes1, 0.0, damped(b2, value1)) + c2
    return a, b, c, tl.where(passes2, value1, value2), passes1 & passes2


@triton.jit
def span(cu_seqlens_ptr, N, T):
    """(first step, number of steps) of this program's sequence; offsets outside [0, N] are clamped to it."""
    sequence = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        first, steps = sequence * T, T.to(tl.int64)
    else:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), N)
        steps = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), N) - first
    return first, steps


@triton.jit(do_not_specialize=["N", "T", "rewards_stride_b", "rewards_stride_t", "values_stride_b", "values_stride_t"])
def gae_kernel(
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_ptr,
    dones_ptr,
    advantages_ptr,
    returns_ptr,
    N: tl.int64,
    T,
    rewards_stride_b: tl.int64,
    rewards_stride_t: tl.int64,
    values_stride_b: tl.int64,
    values_stride_t: tl.int64,
    gamma,
    gamma_lam,
    CARRY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence, from its end: blocks of steps, each scanned from the state the later block left."""
    first, steps = span(cu_seqlens_ptr, N, T)
    if cu_seqlens_ptr is None:
        rewards_ptr += tl.program_id(0).to(tl.int64) * rewards_stride_b
        values_ptr += tl.program_id(0).to(tl.int64) * values_stride_b
    else:
        rewards_ptr += first * rewards_stride_t
        values_ptr += first * values_stride_t
    advantage, next_value = 0.0, 0.0
    if bootstrap_ptr is not None:
        next_value = tl.load(bootstrap_ptr + tl.program_id(0)).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    for start in range(0, steps, BLOCK):
        t = steps - 1 - start - lane
        exists = t >= 0
        counted = exists
        if mask_ptr is not None:
            counted &= tl.load(mask_ptr + first + t, exists, other=0) != 0
        reward = tl.load(rewards_ptr + t * rewards_stride_t, counted, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + t * values_stride_t, counted, other=0.0).to(tl.float32)
        passes = (counted if CARRY else exists) == 0
        cut = passes
        if dones_ptr is not None:
            cut |= tl.load(dones_ptr + first + t, exists, other=0) != 0
        a = tl.where(passes, 1.0, tl.where(cut, 0.0, gamma_lam))
        b = tl.where(cut, 0.0, gamma)
        c = tl.where(passes, 0.0, reward - value)
        a, b, c, last, passes = tl.associative_scan((a, b, c, value, passes), 0, compose)
        result = damped(a, advantage) + damped(b, next_value) + c
        tl.store(advantages_ptr + first + t, tl.where(counted, result, 0.0), exists)
        tl.store(returns_ptr + first + t, tl.where(counted, result + value, 0.0), exists)
        end = lane == BLOCK - 1
        next_value = tl.sum(tl.where(end, tl.where(passes, next_value, last), 0.0), 0)
        advantage = tl.sum(tl.where(end, result, 0.0), 0)


def gae(inputs: GaeInputs) -> tuple[Tensor, Tensor]:
    """Advantages and returns of inputs in float32, bfloat16 or float16, of any strides."""
    rewards, values, cu_seqlens, mask, bootstrap, dones, gamma, lam, mask_mode = inputs
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if rewards.numel() == 0:
        return advantages, returns
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows, values = (rewards, values) if cu_seqlens is None else (rewards[None], values[None])
    tile = tuning.scan_tile(rewards.numel() // sequences)
    with on_device_of(rewards):
        gae_kernel[(sequences,)](
            rows,
            values,
            cu_seqlens,
            None if mask is None else mask.contiguous(),
            None if bootstrap is None else bootstrap.contiguous(),
            None if dones is None else dones.contiguous(),
            advantages,
            returns,
            rewards.numel(),
            rewards.shape[-1],
            *rows.stride(),
            *values.stride(),
            gamma,
            gamma * lam,
            CARRY=mask_mode == "carry",
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return advantages, returns
