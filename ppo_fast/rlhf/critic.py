"""Pre-train a value model on scored responses: of a run, of a file, or sampled here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast import ops
from ppo_fast.rlhf.config.files import load_config
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.supervised import ValueConfig
from ppo_fast.rlhf.data.examples import Batch, Scored, scored_example
from ppo_fast.rlhf.data.prompts import PromptSampler, load_prompts, make_batch
from ppo_fast.rlhf.decoding.requests import noise_seed
from ppo_fast.rlhf.errors import UserError, check
from ppo_fast.rlhf.models.forward import response_values
from ppo_fast.rlhf.models.loading import GENERATION, padding_id
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.models.value import ValueModel
from ppo_fast.rlhf.ppo.metrics import explained_variance
from ppo_fast.rlhf.ppo.reward_sources import PromptRows, Responses, RewardFunction, load_sources
from ppo_fast.rlhf.ppo.rewards import Scorer
from ppo_fast.rlhf.ppo.rollout import generate
from ppo_fast.rlhf.preflight import check_objects, check_supervised
from ppo_fast.rlhf.supervised.reward_model import load_scalar_model
from ppo_fast.rlhf.supervised.train import Objective, Source, SupervisedResult, fit, load_data, setup_run
from ppo_fast.rlhf.training.log import SAMPLES, sample_records
from ppo_fast.rlhf.training.resume import with_kernels
from ppo_fast.rlhf.training.runtime import find_device
from ppo_fast.rlhf.user_code import load_callable

STATS = "value_stats.json"  # in the directory of the value model: how much of the held-out returns it explains
CONFIGS = (".yaml", ".yml", ".toml")


@dataclass(frozen=True)
class ValueRegression(Objective[Scored]):
    """Half the mean squared error of the values of the states before each token, against the discounted score.

    With n tokens the return of token t, from 0, is gamma^(n - 1 - t) * score: the score comes with the last token.
    """

    stage = "value model"
    gamma: float = 1.0
    eos_ids: tuple[int, ...] = ()  # that end a completion
    before: dict[str, float] = field(default_factory=dict)  # held-out metrics of the model at the start

    def values(self, examples: Sequence[Scored]) -> Tensor:
        """Return [N] float32, example by example."""
        return self.run(self._values, self.batch(examples))

    @staticmethod
    def _values(model: PreTrainedModel, batch: Batch) -> Tensor:
        rows = np.arange(len(batch.grid.ids))
        return response_values(ValueModel.from_classifier(model), batch.grid.sequences(rows, packed=False))

    def returns(self, examples: Sequence[Scored]) -> Tensor:
        """Return [N] float32, example by example."""
        found = [
            score * self.gamma ** np.arange(n)[::-1] for score, n in ((each.score, each.weight) for each in examples)
        ]
        return torch.tensor(np.concatenate(found), dtype=torch.float32, device=self.model.device)

    def loss(self, examples: Sequence[Scored]) -> ops.LossOutput:
        batch, returns = self.batch(examples), self.returns(examples)

        def loss(model: PreTrainedModel) -> ops.LossOutput:
            return ops.LossOutput(ops.value_loss(self._values(model, batch), returns, None).loss, {})

        return self.run(loss)

    def begin(self, examples: Sequence[Scored]) -> None:
        self.before.update(self.evaluate(examples) if examples else {})

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Scored]) -> dict[str, float]:
        values = self.gathered(self.values, examples)
        returns = self.returns(examples)
        loss = ops.value_loss(values, returns, None).loss
        return {"loss": loss.item(), "explained_variance": explained_variance(values, returns).item()}

    def extra_files(self, examples: Sequence[Scored]) -> dict[str, object]:
        """Return the EOS tokens, and the held-out metrics before and after."""
        files: dict[str, object] = {GENERATION: {"eos_token_id": [*self.eos_ids]}}
        return files | ({STATS: {"before": self.before, "after": self.evaluate(examples)}} if examples else {})


def train_value_model(
    config: ValueConfig,
    *,
    train: Source | None = None,
    held_out: Source | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[object] = (),
    resume: bool | str = False,
) -> SupervisedResult:
    """Pre-train a value model for `model.value_path`; inputs that are not passed are read from `config`.

    The result is a model for AutoModelForSequenceClassification, whose score is the value at every token, and its
    `value_stats.json`: loss and explained variance over the tokens of the held-out responses, before and after.

    Args:
        config: the run; equal configs and inputs give equal results on one machine.
        train: a path, or rows {"prompt", "completion", "score"[, "ended"]}; a completion that has not "ended" gets no
            EOS. Or a run, for its samples; or the config of a PPO run, whose policy answers `config.samples` prompts.
        held_out: the same, for the evaluation.
        model: a causal LM, whose backbone gets a new head; trained in place.
        tokenizer: the model's.
        callbacks: objects with any of the methods of :class:`ppo_fast.rlhf.Callback`.
        resume: continue the newest checkpoint in `config.output_dir`, bitwise as if it had never stopped; see
            :func:`ppo_fast.rlhf.train_ppo`. In the config, `optim.epochs` and `log` may differ.

    Raises:
        UserError: an unusable input, a failing callback, a NaN, a full disk; one sentence, which names the step. Saved
            files stay as they are.
        Interrupted: SIGINT or SIGTERM came; a KeyboardInterrupt, raised after the step when a checkpoint is saved.

    Source: Yuan et al. 2025, arXiv:2503.01491, section 3.1.
    """
    check_objects(config, ValueConfig, model=model, tokenizer=tokenizer)
    with setup_run(config, resume, callbacks) as start:
        _check_inputs(config, train, held_out, given=model is not None and tokenizer is not None)
        weights = dataclasses.replace(config, model=with_kernels(config.model, start.checkpoint))
        loaded = load_scalar_model(weights, start.generator, model, tokenizer)
        make = functools.partial(scored_example, eos_ids=loaded.eos_ids)
        train, held_out = (
            _rows(named if source is None else source, config, loaded.tokenizer)
            for source, named in ((train, config.data.train), (held_out, config.data.held_out))
        )
        data = load_data(config, make, loaded.tokenizer, start.generator, train, held_out)
        common = (loaded.model, padding_id(loaded.tokenizer), config.optim.width)
        objective = ValueRegression(*common, config.gamma, loaded.eos_ids, adapters=loaded.adapters)
        return fit(config, objective, data, loaded.tokenizer, start)


def sample_scored(
    config: PPOConfig,
    count: int,
    *,
    reward_fn: RewardFunction | None = None,
    prompts: str | PromptRows | None = None,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[str, Any]]:
    """Answer `count` prompts of a PPO config by its policy, and score the answers as its first update would.

    Returns rows {"prompt_ids", "completion_ids", "score"} for `train_value_model`. A prompt comes again once all had
    their turn. The inputs passed are those of :func:`ppo_fast.rlhf.train_ppo`.

    Raises UserError for a config with `rollout.function`: such rows have no place for the tokens of tools.
    """
    function = config.rollout.function
    check(function is None, "rollout.function", "null to sample responses for a value model", function)
    generator = torch.Generator(find_device(config.model.device)).manual_seed(config.seed)
    models = load_models(
        config.model, generator, policy=policy, tokenizer=tokenizer, reward=config.reward, critic=False
    )
    source = config.data.prompts if prompts is None else prompts
    if source is None:
        raise UserError("data.prompts: expected a file of prompts, got null")
    data = load_prompts(source, models.tokenizer, config.data)
    filter_fn = load_callable(config.reward.filter, "reward.filter") if config.reward.filter else None
    sources, longest = load_sources(config, models, reward_fn), config.rollout.max_new_tokens
    scorer = Scorer(sources, config.reward, filter_fn, max_new_tokens=longest)
    models.split(config.model)
    scorer.split(models, config.model)
    sampler, found = (
        PromptSampler(len(data.token_ids), generator, shuffle=config.data.shuffle),
        list[dict[str, Any]](),
    )
    drawn = 0  # responses
    while len(found) < count:
        batch = make_batch(data, sampler.take(config.rollout.batch_size), models.pad_id, models.device)
        answers = generate(models, batch, config.rollout, noise_seed(config.seed, "rollout"), drawn)
        drawn += config.rollout.batch_size
        responses = Responses.from_generation(answers, models.tokenizer)
        scores = scorer(responses)
        rows = zip(responses.prompt_ids, responses.completion_ids, scores.totals.tolist(), scores.verdicts, strict=True)
        names = ("prompt_ids", "completion_ids", "score")
        found += [dict(zip(names, row, strict=True)) for *row, verdict in rows if verdict != "mask"]
        if not found:
            raise UserError("filter: expected one response or more to be kept, got 'mask' for all of the first batch")
    return found[:count]


def _check_inputs(config: ValueConfig, train: Source | None, held_out: Source | None, given: bool) -> None:
    """`check_supervised` of what are rows or a file of them."""
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, train=None, held_out=None))
    train, held_out = (
        None if isinstance(source, str | Path) and _is_run(Path(source)) else source
        for source in (
            config.data.train if train is None else train,
            config.data.held_out if held_out is None else held_out,
        )
    )
    forms = ("prompt", "completion", "score"), ("prompt_ids", "completion_ids", "score")
    check_supervised(own, train, held_out, *forms, given=given)


def _is_run(path: Path) -> bool:
    """Whether a source of examples is a run with its samples, or the config of one."""
    return (path / SAMPLES).is_file() or path.suffix in CONFIGS


def _rows(source: Source | None, config: ValueConfig, tokenizer: PreTrainedTokenizerBase) -> Source | None:
    """Return rows, or a file of them, for a run or the config of a PPO run."""
    if not isinstance(source, str | Path):
        return source
    path = Path(source)
    if (path / SAMPLES).is_file():
        records = sample_records(path / SAMPLES, "prompt", "completion", "score")
        return [{**record, "sampled": True} for record in records]
    if path.suffix not in CONFIGS:
        return source
    asked: PPOConfig = load_config(path)
    rows: list[dict[str, Any]] = sample_scored(asked, config.samples)
    known = len(tokenizer)
    highest = max(max(each) for row in rows for each in (row["prompt_ids"], row["completion_ids"]))
    if highest >= known:
        raise UserError(f"data.train: expected a policy with the tokenizer of {known} tokens, got the token {highest}")
    return rows
