"""PPO for language models: the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .advantages import compute_targets
from .checkpoint import save_models
from .config import PPOConfig
from .configfile import save_config
from .data import PromptBatch, Prompts, PromptSampler, load_prompts, make_batch
from .errors import UserError
from .metrics import collect, require_finite
from .models import Models, load_models
from .rewards import KLCoefficient, RewardFunction, compute_rewards, load_reward_function
from .rollout import generate, score, warn_about_filters
from .runlog import CHECKPOINTS, FINAL, RunLog
from .runtime import Stopwatch, find_device, named, threads, warn_about_precision
from .update import Learner


@dataclass(frozen=True)
class PPOResult:
    """What a run returns."""

    directory: Path  # the run: config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/
    model: Path  # the final model directory, for AutoModelForCausalLM.from_pretrained
    history: list[dict[str, float]]  # metrics of every update, by name
    models: Models  # as trained, in memory


@dataclass
class Run:
    """The moving parts of a run and one turn of its loop."""

    config: PPOConfig
    models: Models
    data: Prompts
    reward_fn: RewardFunction
    generator: torch.Generator  # every random number of the run

    def __post_init__(self) -> None:
        self.sampler = PromptSampler(len(self.data.token_ids), self.generator, shuffle=self.config.data.shuffle)
        self.learner = Learner(self.models, self.config)
        self.kl = KLCoefficient(self.config.kl, self.models.device)
        # Scored in the batches of the update, the logits of the whole rollout never exist.
        optim, rollout = self.config.optim, self.config.rollout
        width = rollout.micro_batch_size or optim.micro_batch_size or optim.minibatch_size
        self.scoring = dataclasses.replace(rollout, micro_batch_size=width)

    def step(self, update: int, log: RunLog) -> None:
        """Update number `update`, counted from 1: sample, score, improve, report."""
        config, clock = self.config, Stopwatch(self.models.device)
        with clock("rollout"):
            generation = generate(self.models, self._next_prompts(), config.rollout, self.generator)
        with clock("logprobs"):
            rollout = score(self.models, generation, self.scoring)
            require_finite(logprobs=rollout.logprobs, ref_logprobs=rollout.ref_logprobs, values=rollout.values)
        with clock("score"):
            rewards = compute_rewards(rollout, self.models.tokenizer, self.reward_fn, self.kl, config.reward)
        with clock("update"):
            targets = compute_targets(rollout, rewards, config.advantage)
            stats = self.learner.update(rollout, targets, self.kl.coef, update - 1, self.generator)
            self.kl.update(rewards.kl)
        metrics = collect(rollout, rewards, targets, stats, config, clock.seconds)
        log.write(update, metrics, stats.note)
        log.write_samples(update, rollout, rewards)
        if config.log.save_every and update % config.log.save_every == 0:
            save_models(self.models, log.directory / CHECKPOINTS / f"update-{update:06d}")

    def _next_prompts(self) -> PromptBatch:
        repeat = self.config.rollout.samples_per_prompt
        rows = self.sampler.take(self.config.rollout.batch_size // repeat)
        rows = [row for row in rows for _ in range(repeat)]
        return make_batch(self.data, rows, self.models.pad_id, self.models.device)


def train_ppo(
    config: PPOConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: Iterable[Any] | None = None,
    policy: Any = None,
    tokenizer: Any = None,
) -> PPOResult:
    """Train a causal language model by PPO; what is not passed as an object is read from where `config` says.

    Args:
        config: the run; equal configs and inputs give equal results on one machine.
        reward_fn: f(prompts, completions, completion_ids, **columns) -> a number, or a list of one number per
            token, for each completion; called by keyword.
        prompts: texts, or rows {"prompt": text or messages, column: ...}.
        policy: a causal LM, trained in place.
        tokenizer: the one the policy was made with.

    Raises:
        UserError: an input that cannot be used, a failing reward function, a NaN; one sentence, which names the
            update. What was saved before stays as it is.

    Source: Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593.
    """
    log = RunLog(config)
    warn_about_filters(config.rollout)
    generator = torch.Generator(find_device(config.model.device)).manual_seed(config.seed)
    with threads(config.threads):
        reward_fn = reward_fn or load_reward_function(config.reward.function)
        models = load_models(config.model, generator, policy=policy, tokenizer=tokenizer)
        data = load_prompts(_prompt_source(config, prompts), models.tokenizer, config.data)
        _check_vocabulary(models, data)
        _check_context(config, models, data)
        warn_about_precision(models.policy, config.optim)
        run = Run(config, models, data, reward_fn, generator)
        with log:
            save_config(config, log.directory / "config.yaml")
            for update in range(1, config.updates + 1):
                with named(f"update {update}"):
                    run.step(update, log)
            final = save_models(models, log.directory / FINAL)
    return PPOResult(log.directory, final, log.history, models)


def _prompt_source(config: PPOConfig, prompts: Iterable[Any] | None) -> Any:
    source = config.data.prompts if prompts is None else prompts
    if source is None:
        raise UserError("data.prompts: expected a file of prompts, got null")
    return source


def _check_vocabulary(models: Models, data: Prompts) -> None:
    known = len(models.policy.get_input_embeddings().weight)
    highest = max(models.pad_id, models.eos_id, *map(max, data.token_ids))
    if highest >= known:
        raise UserError(f"tokenizer: expected ids below {known}, the tokens that the model knows, got {highest}")


def _check_context(config: PPOConfig, models: Models, data: Prompts) -> None:
    limit = getattr(models.policy.config, "max_position_embeddings", None)
    longest = max(map(len, data.token_ids))
    if limit is not None and longest + config.rollout.max_new_tokens > limit:
        raise UserError(
            f"rollout.max_new_tokens: expected at most {limit - longest} (the model's context of {limit} less the "
            f"longest prompt of {longest}), got {config.rollout.max_new_tokens}"
        )
