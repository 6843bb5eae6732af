"""Bytes of live tensors in every phase of real updates on a CPU, by the profiler's record of each allocation."""

from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ppo_fast.rlhf import PPOConfig
from ppo_fast.rlhf.advantages import make_experience
from ppo_fast.rlhf.data import load_prompts, make_batch
from ppo_fast.rlhf.models import load_models
from ppo_fast.rlhf.rewards import Rewards
from ppo_fast.rlhf.rollout import Rollout, Sampler, generate, score
from ppo_fast.rlhf.update import Learner

PHASES = ("rollout", "scoring", "update")


def measured_peaks(config: PPOConfig, make_policy: Any, tokenizer: Any, prompt_tokens: int) -> dict[str, int]:
    """Largest sum of live bytes in each phase of the second of two updates, models included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        generator = torch.Generator().manual_seed(0)
        models = load_models(config.model, generator, policy=make_policy(), tokenizer=tokenizer)
        learner = Learner(models, config)
        for index in range(2):
            one_update(index, config, models, learner, generator, prompt_tokens)
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    times, alive = np.array([time for time, _ in changes]), np.array([count for _, count in changes]).cumsum()
    peaks = {}
    for event in events:
        name, _, index = event.name().partition(" ")
        if name in PHASES and index == "1":
            inside = (times >= event.start_ns()) & (times <= event.start_ns() + event.duration_ns())
            peaks[name] = int(alive[inside].max())
    return peaks


def one_update(index: int, config: PPOConfig, models: Any, learner: Any, generator: Any, prompt_tokens: int) -> None:
    """Ragged prompts, the longest of `prompt_tokens`; no response ends early."""
    prompts = [" ".join(["w1"] * (prompt_tokens - row % 2)) for row in range(config.rollout.batch_size)]
    data = load_prompts(prompts, models.tokenizer, config.data)
    batch = make_batch(data, list(range(len(prompts))), models.pad_id, models.device)
    with record_function(f"rollout {index}"):
        generation = generate(models, batch, config.rollout, generator)
    width = config.rollout.micro_batch_size or config.optim.micro_batch_size or config.optim.minibatch_size
    with record_function(f"scoring {index}"):
        rollout = score(models, generation, dataclasses.replace(config.rollout, micro_batch_size=width))
    rewards = made_rewards(rollout)
    with record_function(f"update {index}"):
        learner.update(make_experience(rollout, rewards, config.advantage), 0.05, index, generator)


def made_rewards(rollout: Rollout) -> Rewards:
    zeros = torch.zeros_like(rollout.values)
    return Rewards(*[zeros] * 3)
