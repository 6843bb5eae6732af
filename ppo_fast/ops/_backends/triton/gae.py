"""Generalized advantage estimation as a reverse associative scan, for CUDA machines without the extension.

A step maps the advantage after it to its own: advantage' = a * advantage + c, with the next value in c. Two maps
compose to such a map, so a block of steps is one scan, and blocks follow each other from the end. Where masked steps
pass on what they are handed, another scan finds the next value of each step first.
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
def compose(a1, c1, a2, c2):
    """The map of steps 1 followed, towards the start of the sequence, by steps 2."""
    return a2 * a1, damped(a2, c1) + c2


@triton.jit
def nearest(value1, passes1, value2, passes2):
    """The value of steps 2 or, where these pass, that of steps 1 after them."""
    return tl.where(passes2, value1, value2), passes1 & passes2


@triton.jit
def span(cu_seqlens_ptr, N, T, ALIGNED: tl.constexpr):
    """(first step, number of steps) of this program's sequence; offsets outside [0, N] are clamped to it."""
    sequence = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        first, steps = sequence * T, T.to(tl.int64)
        if ALIGNED:
            first, steps = tl.multiple_of(first, 16), tl.multiple_of(steps, 16)
    else:
        first = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), N)
        steps = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64), N) - first
    return first, steps


@triton.jit
def sequence_of(ptr, first, cu_seqlens_ptr, stride_b, stride_t, ALIGNED: tl.constexpr):
    """The first step of this program's sequence in rewards or values."""
    if cu_seqlens_ptr is None:
        offset = tl.program_id(0).to(tl.int64) * stride_b
        if ALIGNED:
            offset = tl.multiple_of(offset, 16)
    else:
        offset = first * stride_t
    return ptr + offset


@triton.jit
def steps_of(ptr, t, stride_t, UNIT: tl.constexpr):
    """Pointers to steps t; known to be neighbors where the stride is 1."""
    if UNIT:
        return ptr + t
    return ptr + t * stride_t


@triton.jit
def flags(ptr, t, exists):
    """Flags of steps t: not 0."""
    return tl.load(ptr + t, exists, other=0) != 0


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
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence, from its end: blocks of steps, each scanned from the state the later block left.

    CARRY: masked steps pass on what they are handed. UNIT: the stride over steps is 1; ALIGNED: and every sequence
    starts on 16 elements.
    """
    first, steps = span(cu_seqlens_ptr, N, T, ALIGNED)
    rewards_ptr = sequence_of(rewards_ptr, first, cu_seqlens_ptr, rewards_stride_b, rewards_stride_t, ALIGNED)
    values_ptr = sequence_of(values_ptr, first, cu_seqlens_ptr, values_stride_b, values_stride_t, ALIGNED)
    if mask_ptr is not None:
        mask_ptr += first
    if dones_ptr is not None:
        dones_ptr += first
    advantage, next_value = 0.0, 0.0
    if bootstrap_ptr is not None:
        next_value = tl.load(bootstrap_ptr + tl.program_id(0)).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    blocks = tl.cdiv(steps, BLOCK)
    for block in range(blocks):
        t = (blocks - 1 - block) * BLOCK + lane
        exists = t < steps
        counted = exists
        if mask_ptr is not None:
            counted &= flags(mask_ptr, t, exists)
        passes = (counted if CARRY else exists) == 0
        cut = passes
        if dones_ptr is not None:
            cut |= flags(dones_ptr, t, exists)
        reward = tl.load(steps_of(rewards_ptr, t, rewards_stride_t, UNIT), exists, other=0.0).to(tl.float32)
        value = tl.load(steps_of(values_ptr, t, values_stride_t, UNIT), exists, other=0.0).to(tl.float32)
        reward, value = tl.where(counted, reward, 0.0), tl.where(counted, value, 0.0)
        after = t + 1
        follows = after < steps
        later = tl.load(steps_of(values_ptr, after, values_stride_t, UNIT), follows, other=0.0).to(tl.float32)
        if mask_ptr is not None:
            follows &= flags(mask_ptr, after, follows)
            later = tl.where(follows, later, 0.0)
        if CARRY:
            later, missing = tl.associative_scan((later, follows == 0), 0, nearest, reverse=True)
            later = tl.where(missing, next_value, later)
            next_value = tl.sum(tl.where(lane == 0, tl.where(passes, later, value), 0.0), 0)
        else:
            later = tl.where(after == steps, next_value, later)
        a = tl.where(passes, 1.0, tl.where(cut, 0.0, gamma_lam))
        c = tl.where(passes, 0.0, reward - value + damped(tl.where(cut, 0.0, gamma), later))
        a, c = tl.associative_scan((a, c), 0, compose, reverse=True)
        result = damped(a, advantage) + c
        advantage = tl.sum(tl.where(lane == 0, result, 0.0), 0)
        tl.store(advantages_ptr + first + t, tl.where(counted, result, 0.0), exists)
        tl.store(returns_ptr + first + t, tl.where(counted, result + value, 0.0), exists)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether the rows of these [B, T] tensors have stride 1 over T and start on 16 bytes and 16 elements."""
    given = [x for x in tensors if x is not None]
    return all(x.data_ptr() % 16 == 0 and x.stride(1) == 1 and not (x.stride(0) | x.shape[1]) % 16 for x in given)


def gae(inputs: GaeInputs) -> tuple[Tensor, Tensor]:
    """Advantages and returns of inputs in float32, bfloat16 or float16, of any strides."""
    rewards, values, cu_seqlens, mask, bootstrap, dones, gamma, lam, mask_mode = inputs
    advantages = torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device)
    returns = torch.empty_like(advantages)
    if rewards.numel() == 0:
        return advantages, returns
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows, values = (rewards, values) if cu_seqlens is None else (rewards[None], values[None])
    mask, dones = (None if x is None else x.contiguous() for x in (mask, dones))
    tile = tuning.scan_tile(rewards.numel() // sequences)
    with on_device_of(rewards):
        gae_kernel[(sequences,)](
            rows,
            values,
            cu_seqlens,
            mask,
            None if bootstrap is None else bootstrap.contiguous(),
            dones,
            advantages,
            returns,
            rewards.numel(),
            rewards.shape[-1],
            *rows.stride(),
            *values.stride(),
            gamma,
            gamma * lam,
            CARRY=mask is not None and mask_mode == "carry",
            UNIT=rows.stride(1) == values.stride(1) == 1,
            ALIGNED=cu_seqlens is None and aligned(rows, values, mask, dones),
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return advantages, returns
