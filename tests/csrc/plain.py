"""The plain recursion of generalized advantage estimation: one sequence axis, a Python loop over time."""

import itertools
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def plain_gae(
    rewards: Array,
    values: Array,
    mask: Array | None,
    bootstrap: Array | None,
    dones: Array | None,
    gamma: float,
    lam: float,
    mask_mode: str,
) -> tuple[Array, Array]:
    """(advantages, returns) [B, T], in the arithmetic of the dtype of ``rewards``, every operation rounded."""
    B, T = rewards.shape
    dtype = rewards.dtype.type
    discount, decay = dtype(gamma), dtype(gamma * lam)
    counted = np.ones((B, T), bool) if mask is None else mask
    done = np.zeros((B, T), bool) if dones is None else dones
    advantage = np.zeros(B, dtype)
    next_value = np.zeros(B, dtype) if bootstrap is None else bootstrap.astype(dtype)
    advantages, returns = np.zeros((B, T), dtype), np.zeros((B, T), dtype)
    for t in reversed(range(T)):
        c, d = counted[:, t], done[:, t]
        r, v = np.where(c, rewards[:, t], dtype(0)), np.where(c, values[:, t], dtype(0))
        delta = (r + discount * np.where(d, dtype(0), next_value)) - v
        stepped = delta + decay * np.where(d, dtype(0), advantage)
        advantages[:, t] = np.where(c, stepped, dtype(0))
        returns[:, t] = np.where(c, stepped + v, dtype(0))
        moves = c if mask_mode == "carry" else np.ones(B, bool)
        advantage, next_value = np.where(moves, stepped, advantage), np.where(moves, v, next_value)
    return advantages, returns


def plain_gae_packed(
    rewards: Array,
    values: Array,
    cu_seqlens: list[int],
    mask: Array | None,
    bootstrap: Array | None,
    dones: Array | None,
    gamma: float,
    lam: float,
    mask_mode: str,
) -> tuple[Array, Array]:
    """:func:`plain_gae` of each of the packed sequences."""
    advantages, returns = np.zeros_like(rewards), np.zeros_like(rewards)
    for s, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):

        def row(x: Array | None, begin: int = begin, end: int = end) -> Array | None:
            return None if x is None else x[None, begin:end]

        last = None if bootstrap is None else bootstrap[s : s + 1]
        result = plain_gae(row(rewards), row(values), row(mask), last, row(dones), gamma, lam, mask_mode)
        advantages[begin:end], returns[begin:end] = result[0][0], result[1][0]
    return advantages, returns
