"""PPO for language models: the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.rlhf.config.files import save_config
from ppo_fast.rlhf.config.ppo import PPOConfig, check_ranks
from ppo_fast.rlhf.data.curriculum import make_arrangement
from ppo_fast.rlhf.data.prompts import PromptBatch, Prompts, PromptSampler, load_prompts, make_batch
from ppo_fast.rlhf.decoding.engines import check_engine
from ppo_fast.rlhf.decoding.requests import noise_seed
from ppo_fast.rlhf.decoding.vllm_engine import import_vllm, longest_sequence, running
from ppo_fast.rlhf.errors import BatchError, UserError, check
from ppo_fast.rlhf.models.models import Models, load_models
from ppo_fast.rlhf.ppo.advantages import make_experience
from ppo_fast.rlhf.ppo.batch import PPOBatch
from ppo_fast.rlhf.ppo.correction import make_correction
from ppo_fast.rlhf.ppo.dynamic_sampling import resample
from ppo_fast.rlhf.ppo.environment import RolloutFunction, respond
from ppo_fast.rlhf.ppo.evaluation import Evaluation, load_evaluation
from ppo_fast.rlhf.ppo.failures import save_failure
from ppo_fast.rlhf.ppo.log import RunLog
from ppo_fast.rlhf.ppo.metrics import collect, phase_work
from ppo_fast.rlhf.ppo.reference import Reference
from ppo_fast.rlhf.ppo.reward_hacking import RewardHackingMonitor
from ppo_fast.rlhf.ppo.reward_sources import PromptRows, Responses, RewardFunction, load_sources
from ppo_fast.rlhf.ppo.rewards import (
    KLCoefficient,
    ScoredBatch,
    Scorer,
    ScoreResponses,
    compute_rewards,
    warn_about_whitening,
    without_masked,
    without_truncated,
)
from ppo_fast.rlhf.ppo.rollout import Generation, warn_about_filters
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.preflight import check_objects, check_ppo
from ppo_fast.rlhf.reports.card import check_hub, publish
from ppo_fast.rlhf.training.callbacks import Callback, Objects, StepRecord, UserCallback, user_callbacks
from ppo_fast.rlhf.training.checkpoint import load_weights, save_models, write_models
from ppo_fast.rlhf.training.finite import require_finite
from ppo_fast.rlhf.training.lock import hold_directory
from ppo_fast.rlhf.training.log import FINAL, StageLog
from ppo_fast.rlhf.training.loop import TrainingLoop, describe_model
from ppo_fast.rlhf.training.resume import (
    file_digests,
    inputs,
    load_start,
    prompt_inputs,
    report_write_errors,
    with_kernels,
)
from ppo_fast.rlhf.training.runtime import Stopwatch, find_device, threads, warn_about_precision
from ppo_fast.rlhf.training.signals import StopSignals
from ppo_fast.rlhf.training.state import Stateful, check_state
from ppo_fast.rlhf.training.utilization import Utilization, matmul_rate
from ppo_fast.rlhf.user_code import UserState, clear_module_cache, load_callable
from ppo_fast.rlhf.world import current, join


@dataclass(frozen=True)
class PPOResult:
    """The result of a run."""

    directory: Path  # the run: config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/
    model: Path  # the final model directory, for AutoModelForCausalLM.from_pretrained
    history: list[dict[str, float]]  # metrics of every update, by name
    models: Models  # as trained, in memory


@dataclass
class PPORun(TrainingLoop):
    """The state of a PPO run, and one step of it."""

    config: PPOConfig
    models: Models
    data: Prompts
    scorer: Scorer
    evaluation: Evaluation | None
    generator: torch.Generator  # every random number of the run except the noise that draws tokens
    callbacks: Sequence[UserCallback] = ()
    rollout_fn: RolloutFunction | None = None
    length = "updates"

    def __post_init__(self) -> None:
        settings, arrange = self.config.data, make_arrangement(self.data, self.config.data)
        count = len(self.data.token_ids)
        self.sampler = PromptSampler(count, self.generator, shuffle=settings.shuffle, arrange=arrange)
        self.learner = Learner(self.models, self.config)
        self.reference = Reference(self.models, self.config.reference)
        self.monitors = RewardHackingMonitor()
        self.watch = Stopwatch(self.models.device, peaks=bool(self.callbacks))
        self.learner.progress = self.watch.progress
        rate = matmul_rate(self.models.device, self.models.policy.dtype)
        self.utilization = Utilization(rate, phase_work(self.models))
        self.kl = KLCoefficient(self.config.kl, self.models.device)
        held_out = prompt_inputs(self.evaluation.data, "held-out ") if self.evaluation is not None else {}
        self.inputs = inputs(self.models.policy, prompt_inputs(self.data) | held_out)
        reward, function = self.config.reward, self.config.rollout.function
        names = [reward.function, reward.filter, function, settings.order, *self.config.evaluation.evaluators]
        self.code = file_digests(names)
        users = {"reward": getattr(self.scorer.sources[0], "function", None), "filter": self.scorer.filter}
        users["rollout"] = self.rollout_fn
        kept = {name: user for name, user in users.items() if hasattr(user, "load_state_dict")}
        self.user_states = {name: UserState(f"{name} function", user) for name, user in kept.items()}
        current().each(self._check_user_states)
        self.total = self.config.updates
        # The noise of a response depends on its number among all that the run samples.
        self.seed, self.row = noise_seed(self.config.seed, "rollout"), 0

    def _check_user_states(self) -> None:
        for name, user in self.user_states.items():
            check_state(user.state_dict(), f"{name} function's state_dict")

    def step(self, update: int, log: StageLog) -> StepRecord:
        """Take update `update`, from 0: sample, score, improve, measure."""
        config, watch, metrics = self.config, self.watch, dict[str, float]()
        watch.restart()
        with watch("rollout"):
            self.row = update * config.rollout.batch_size * (1 + config.rollout.dynamic_sampling)
            batch = PPOBatch(self._answers(config.rollout.batch_size // config.rollout.samples_per_prompt))
        scorer: ScoreResponses = self.scorer
        replaced = dict[str, float]()
        try:
            if config.rollout.dynamic_sampling:
                with watch("resample"):
                    batch, scorer, replaced = self._resample(batch.generation)
            with watch("logprobs"):
                rollout = score(self.models, batch.generation, config.scoring)
                batch = PPOBatch(rollout.generation, rollout)
                require_finite(logprobs=rollout.logprobs, ref_logprobs=rollout.ref_logprobs, values=rollout.values)
            with watch("score"):
                rewards = compute_rewards(rollout, self.models.tokenizer, scorer, self.kl)
                rollout, rewards = without_masked(rollout, rewards)
                batch = PPOBatch(rollout.generation, rollout, rewards)
                require_finite(rewards=rewards.rewards)
            learned = without_truncated(rollout, rewards) if config.rollout.mask_truncated else (rollout, rewards)
            if learned is None:
                why = f"batch skipped: rollout.mask_truncated leaves out all {len(rewards.verdicts)} responses"
                return self._recorded(update, batch, metrics, why)
            with watch("update"), self.models.recomputing():
                correction = make_correction(learned[0], config.rollout)
                experience = make_experience(*learned, config.advantage, correction)
                batch = PPOBatch(learned[0].generation, *learned, experience)
                stats = self.learner.update(experience, self.kl.coef, update, self.generator)
                if not self.learner.warming_up:  # else the KL would lower a coefficient that had no effect yet
                    self.kl.update(rollout.sums(rewards.kl))
                self.reference.update(update)
            batch = PPOBatch(rollout.generation, rollout, rewards, experience)
            metrics, note = collect(rollout, rewards, experience, stats, config, watch) | replaced, stats.note
            tokens = int(rollout.grid.attention.sum())
            passes = {"update": stats.passes * int(experience.grid.attention.sum()) / tokens}
            metrics |= self.utilization.metrics(tokens / current().size, passes, watch.seconds)
        except BatchError as error:
            note = self.give_up(update, log, error, functools.partial(save_failure, self.models, batch))
        return self._recorded(update, batch, metrics, note)

    def _recorded(self, update: int, batch: PPOBatch, metrics: dict[str, float], note: str | None) -> StepRecord:
        return dataclasses.replace(
            self.record,
            step=update,
            metrics=metrics,
            notes=(note,) if note else (),
            seconds=self.watch.seconds,
            memory=self.watch.memory,
            batch=batch,
            answers=(),
            skipped=self.skipped,
        )

    def _finished(self) -> bool:
        return super()._finished() or (self.evaluation is not None and self.evaluation.exhausted)

    def describe(self) -> list[str]:
        config, models = self.config, self.models
        trained = [*models.trained("policy"), *([] if models.value is None else models.trained("value"))]
        settings = config.model
        critic = [] if models.value is None else ["with a critic"]
        layout = f"layout {settings.layout}" + f" of rank {settings.lora.rank}" * (models.adapters is not None)
        prompts = f"{len(self.data.token_ids):,} prompts" + f" ({self.data.dropped:,} dropped)" * bool(
            self.data.dropped
        )
        run = f"{config.updates:,} updates of {config.rollout.batch_size} responses"
        return [
            describe_model(models.policy, trained, layout, *critic, *["packed"] * models.packed),
            f"{prompts}; {run}; output in {config.output_dir}",
        ]

    def _objects(self) -> Objects:
        return {"models": self.models, "tokenizer": self.models.tokenizer}

    def _own_callbacks(self) -> list[Callback]:
        return [self.monitors] if self.evaluation is None else [self.monitors, self.evaluation]

    def _write(self, directory: Path) -> None:
        write_models(self.models, directory)

    def _load(self, directory: Path) -> None:
        load_weights(self.models, directory)

    def _parts(self) -> dict[str, Stateful]:
        """Return the objects whose state changes during a run, except the weights."""
        named = ("sampler", "learner", "kl", "reference", "monitors", "scorer", "evaluation")
        parts = {name: getattr(self, name) for name in named}
        return {name: part for name, part in parts.items() if hasattr(part, "load_state_dict")} | self.user_states

    def _answers(self, count: int) -> Generation:
        """Sample responses to the next `count` prompts."""
        prompts = self._next_prompts(count)
        settings, progress = self.config.rollout, self.watch.progress
        found = respond(self.models, prompts, settings, self.seed, self.row, self.rollout_fn, progress)
        self.row += len(prompts.prompts)
        return found

    def _resample(self, generation: Generation) -> tuple[PPOBatch, ScoreResponses, dict[str, float]]:
        """Return the batch after `rollout.dynamic_sampling`, a scorer that knows its scores, and a metric."""
        tries = self.config.rollout.dynamic_sampling

        def score_now(generation: Generation) -> ScoredBatch:
            return self.scorer(Responses.from_generation(generation, self.models.tokenizer))

        found = resample(generation, self._answers, score_now, tries=tries, pad_id=self.models.pad_id)
        return PPOBatch(found.generation), lambda responses: found.scores, {"group/replaced": float(found.replaced)}

    def _next_prompts(self, count: int) -> PromptBatch:
        repeat = self.config.rollout.samples_per_prompt
        rows = self.sampler.take(count)
        rows = [row for row in rows for _ in range(repeat)]
        batch = make_batch(self.data, rows, self.models.pad_id, self.models.device)
        return dataclasses.replace(batch, groups=np.arange(len(rows)) // repeat) if repeat > 1 else batch


def train_ppo(
    config: PPOConfig,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: str | PromptRows | None = None,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_prompts: str | PromptRows | None = None,
    callbacks: Sequence[object] = (),
    resume: bool | str = False,
    rollout_fn: RolloutFunction | None = None,
) -> PPOResult:
    """Train a causal language model by PPO; inputs that are not passed are read from `config`.

    Args:
        config: the run; equal configs and inputs give equal results on one machine.
        reward_fn: f(prompts, completions, completion_ids, **columns) -> a number, or a list of one number per
            token, for each completion; called by keyword. It may be `async def`, or return coroutines.
        prompts: texts, or rows {"prompt": text or messages, column: ...}; or a path or a name on the Hub, as
            `data.prompts`.
        policy: a causal LM, trained in place.
        tokenizer: the policy's.
        eval_prompts: held-out prompts, in the forms of `prompts`.
        callbacks: objects with any of the methods of :class:`ppo_fast.rlhf.Callback`.
        resume: continue the newest checkpoint in `config.output_dir`, bitwise as if it had never stopped. The
            inputs must be those of the start; in the config, `updates`, `output_dir`, `overwrite`, `max_hours`,
            `push_to_hub`, `checkpoint` and `log` may differ. Another number of updates stretches the learning-rate
            schedule. A name such as "update-000003" continues that checkpoint; newer ones are renamed, and removed
            when the next is complete.
        rollout_fn: f(prompts, prompt_ids, sample, tokenizer, **columns) -> (token ids, mask, log-probabilities) of
            each response, called by keyword; see :func:`ppo_fast.rlhf.ppo.environment.respond`.

    Raises:
        UserError: an input that cannot be used, a failing reward function or callback, a NaN, a full disk; one
            sentence, which names the update. Saved files stay as they are.
        Interrupted: SIGINT or SIGTERM came; a KeyboardInterrupt, raised after the update when a checkpoint is saved.

    Source: Schulman et al. 2017, arXiv:1707.06347; for language models Ziegler et al. 2019, arXiv:1909.08593.
    """
    functions = {"reward.function": reward_fn, "rollout.function": rollout_fn}
    check_objects(config, PPOConfig, policy=policy, tokenizer=tokenizer, functions=functions)
    given = reward_fn, prompts, policy, tokenizer, eval_prompts
    with open_run(config, *given, callbacks, resume, rollout_fn) as (run, log, stop):
        run.loop(log, stop)
        final = save_models(run.models, log.directory / FINAL)
        publish(final, log, run.models.policy)
        run.end()
    return PPOResult(log.directory, final, log.history, run.models)


@contextlib.contextmanager
def open_run(
    config: PPOConfig,
    reward_fn: RewardFunction | None,
    prompts: str | PromptRows | None,
    policy: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    eval_prompts: str | PromptRows | None = None,
    callbacks: Sequence[object] = (),
    resume: bool | str = False,
    rollout_fn: RolloutFunction | None = None,
) -> Iterator[tuple[PPORun, RunLog, StopSignals]]:
    """Set up a run of `train_ppo`; within the block its directory is locked, its log open, and signals wait."""
    config = dataclasses.replace(config, rollout=config.rollout.resolved())
    with (
        join(config.model.device, config.ddp_timeout),
        hold_directory(config.output_dir),
        threads(config.threads),
    ):
        users = user_callbacks(callbacks)
        if current().mesh is not None:
            current().each(lambda: check_ranks(config))
        if config.rollout.engine == "vllm":
            import_vllm()  # before models are loaded
        start = load_start(config, resume, "updates")
        log = RunLog(config, resume=start.state["log"] if start else None)
        current().on_main(lambda: check_hub(config))
        warn_about_filters(config.rollout)
        warn_about_whitening(config.kl, config.advantage.whitened)
        clear_module_cache()
        given = policy is not None and tokenizer is not None
        check_ppo(config, reward_fn, prompts, eval_prompts, rollout_fn, given)
        generator = torch.Generator(find_device(config.model.device)).manual_seed(config.seed)
        filter_fn = load_callable(config.reward.filter, "reward.filter") if config.reward.filter else None
        weights = with_kernels(config.model, start)
        models = load_models(
            weights,
            generator,
            policy=policy,
            tokenizer=tokenizer,
            reward=config.reward,
            reference=config.reference,
            critic=config.advantage.critic,
        )
        if models.adapters is not None and config.optim.master_weights is False:
            models.adapters.drop_masters()
        check_engine(config.rollout.engine, models.policy)
        data = load_prompts(_prompt_source(config, prompts), models.tokenizer, config.data)
        warn_about_precision(models.policy, config.optim)
        scorer = Scorer(
            load_sources(config, models, reward_fn),
            config.reward,
            filter_fn,
            max_new_tokens=config.rollout.max_new_tokens,
        )
        if rollout_fn is None and config.rollout.function is not None:
            rollout_fn = load_callable(config.rollout.function, "rollout.function")
        own = rollout_fn is not None and config.rollout.engine == "vllm"
        check(not own, "rollout_fn", "None with rollout.engine 'vllm'", rollout_fn)
        evaluation = load_evaluation(config, models, scorer, eval_prompts, rollout_fn)
        for asked in (data, evaluation.data) if evaluation else (data,):
            _check_vocabulary(models, asked)
            _check_context(config, models, asked)
        _warn_about_long_responses(config, data)
        models.split(weights)
        scorer.split(models, weights)
        run = PPORun(config, models, data, scorer, evaluation, generator, users, rollout_fn)
        if start is not None:
            run.restore(start)
        with (
            running(models, config.rollout, longest_sequence(config, models.policy.config)),
            report_write_errors(log.directory),
            log,
            StopSignals(log.unit, config.max_hours) as stop,
        ):
            current().on_main(lambda: save_config(config, log.directory / "config.yaml"))
            yield run, log, stop


def _prompt_source(config: PPOConfig, prompts: str | PromptRows | None) -> str | PromptRows:
    source = config.data.prompts if prompts is None else prompts
    if source is None:
        raise UserError("data.prompts: expected a file of prompts, got null")
    return source


def _check_vocabulary(models: Models, data: Prompts) -> None:
    known = len(models.policy.get_input_embeddings().weight)
    highest = max(models.pad_id, models.eos_id, *map(max, data.token_ids))
    if highest >= known:
        raise UserError(f"tokenizer: expected ids below {known}, the tokens that the model knows, got {highest}")


def _warn_about_long_responses(config: PPOConfig, data: Prompts) -> None:
    longest = max(map(len, data.token_ids)) + config.rollout.max_new_tokens
    for group, limit in (("optim", config.optim.tokens_per_pass), ("rollout", config.rollout.tokens_per_pass)):
        if limit is not None and longest > limit:
            warnings.warn(
                f"{group}.tokens_per_pass: a prompt and its response may have {longest} tokens, more than {limit}; "
                "such a response goes by itself",
                stacklevel=3,
            )


def _check_context(config: PPOConfig, models: Models, data: Prompts) -> None:
    limit = getattr(models.policy.config, "max_position_embeddings", None)
    longest = max(map(len, data.token_ids))
    if limit is not None and longest + config.rollout.max_new_tokens > limit:
        raise UserError(
            f"rollout.max_new_tokens: expected at most {limit - longest} (the model's context of {limit} less the "
            f"longest prompt of {longest}), got {config.rollout.max_new_tokens}"
        )
