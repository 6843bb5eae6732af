"""Bytes of live tensors in every phase of a real run on a CPU, by the profiler's record of each allocation."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ppo_fast.rlhf import PPOConfig, train_ppo
from ppo_fast.rlhf.decoding.requests import Sampling

# The names that the run marks its phases with, and those of the plan.
PHASES = {"rollout": "rollout", "logprobs": "scoring", "score": "reward", "update": "update"}


def measured_peaks(config: PPOConfig, make_policy: Callable[[], Any], tokenizer: Any, tokens: int) -> dict[str, int]:
    """Largest sum of live bytes in each phase of the second of two updates, all_rows since the start included.

    The prompts are ragged, the longest of that many tokens, no two are equal, and no response ends early.
    """
    prompts = [" ".join([f"w{row}"] * (tokens - row % 2)) for row in range(config.rollout.batch_size)]
    function = None if config.reward.models else lambda completions, **_: [float(len(text) % 7) for text in completions]

    def draw(self: Sampling, logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        logits[:, :4] = -torch.inf  # no special token
        return plain_draw(self, logits, keys)

    plain_draw = Sampling.draw
    with (
        mock.patch.object(Sampling, "draw", draw),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        train_ppo(config, reward_fn=function, prompts=prompts, policy=make_policy(), tokenizer=tokenizer)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    times, alive = np.array([time for time, _ in changes]), np.array([count for _, count in changes]).cumsum()
    peaks = {}
    for event in sorted(events, key=lambda event: event.start_ns()):
        kind, _, phase = event.name().partition(" ")
        if kind == "phase":
            inside = (times >= event.start_ns()) & (times <= event.start_ns() + event.duration_ns())
            peaks[PHASES[phase]] = int(alive[inside].max(initial=0))
    return peaks
