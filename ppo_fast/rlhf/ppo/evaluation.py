"""Evaluation on held-out prompts: score, KL, length, win rate against the start; keeps the best model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ppo_fast.rlhf.config.ppo import PPOConfig, RolloutConfig
from ppo_fast.rlhf.data.prompts import Prompts, load_prompts, make_batch
from ppo_fast.rlhf.decoding.requests import noise_seed
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.ppo.environment import RolloutFunction, respond
from ppo_fast.rlhf.ppo.reward_sources import PromptRows, Responses
from ppo_fast.rlhf.ppo.rewards import Scorer
from ppo_fast.rlhf.ppo.rollout import Generation
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.training.best import BestModel
from ppo_fast.rlhf.training.callbacks import Callback, StepRecord
from ppo_fast.rlhf.training.checkpoint import save_models
from ppo_fast.rlhf.training.finite import check_metrics
from ppo_fast.rlhf.training.log import BEST, Record
from ppo_fast.rlhf.training.state import State
from ppo_fast.rlhf.user_code import call, load_callable
from ppo_fast.rlhf.world import current

Evaluator = Callable[..., dict[str, float]]  # f(generate, model, tokenizer), called by keyword


class Evaluation(Callback):
    """Answers the same prompts from the same random numbers each time, so that two evaluations differ by the model.

    Metrics eval/scores, eval/reward (before normalization, clip and penalties), eval/kl (nats per response),
    eval/length, eval/truncated_frac, eval/win_rate (the share of prompts with a higher score than the model at the
    start reached, ties half), and eval/NAME of every evaluator.
    """

    phase, collective = "evaluation", True

    def __init__(
        self,
        config: PPOConfig,
        models: Models,
        scorer: Scorer,
        data: Prompts,
        evaluators: list[Evaluator],
        rollout_fn: RolloutFunction | None = None,
    ) -> None:
        self.rollout_fn = rollout_fn
        self.config, self.models, self.scorer, self.data, self.evaluators = config, models, scorer, data, evaluators
        self.start: list[list[int]] = []  # counted token ids of the answers of the model at the start
        self.start_whole: list[list[int]] = []  # with the tokens that a rollout function put between them
        self.start_ended: list[bool] = []  # which of them have an EOS or a stop string
        settings = config.evaluation
        self.best = BestModel(settings.best, highest=settings.best_is == "max", patience=settings.patience)
        self.answers: list[Record] = []  # of the latest evaluation, paired with those of the model at the start

    def on_start(self, record: StepRecord) -> None:
        """Answer the prompts with the model as it is, unless a resumed run has done so."""
        self.begin()

    def on_step(self, record: StepRecord) -> StepRecord | None:
        """Evaluate every `evaluation.every` updates and after the last; not after a skipped batch."""
        done = record.step + 1
        if not record.metrics or (done % self.config.evaluation.every and done != self.config.updates):
            return None
        metrics, note = self.run(record.directory / BEST)
        return dataclasses.replace(record.adding(metrics, *filter(None, [note])), answers=tuple(self.answers))

    def begin(self) -> None:
        """Answer the prompts with the model as it is, unless a resumed run has done so."""
        if not self.start:
            answers = Responses.from_generation(self._answers(self.data, self.rollout_fn), self.models.tokenizer)
            self.start, self.start_ended = answers.completion_ids, answers.ended
            self.start_whole = answers.response_ids

    def run(self, best: Path) -> tuple[dict[str, float], str | None]:
        """Return the metrics, and a note if the model is the best so far and is saved in `best`."""
        metrics = self._measured() | self._users_metrics()
        check_metrics(metrics)
        return metrics, self.best.update(metrics, best, lambda directory: save_models(self.models, directory))

    @property
    def exhausted(self) -> bool:
        """`evaluation.patience` is at its end."""
        return self.best.exhausted

    def _measured(self) -> dict[str, float]:
        generation = self._answers(self.data, self.rollout_fn)
        rollout = score(self.models, generation, self.config.scoring)
        responses = Responses.from_generation(generation, self.models.tokenizer)
        scored = self.scorer(responses, learn=False)
        scores = scored.totals
        start, start_scores = self._at_the_start(responses)
        wins = torch.sign(scores - start_scores).mean() / 2 + 0.5
        self.answers = [
            dict(zip(("prompt", "completion", "score", "baseline_completion", "baseline_score"), row, strict=True))
            for row in zip(
                responses.prompts,
                responses.completions,
                scores.tolist(),
                start.completions,
                start_scores.tolist(),
                strict=True,
            )
        ]
        values = {
            "eval/scores": scores.mean(),
            "eval/reward": scored.own.combined.mean(),
            "eval/kl": rollout.sums(rollout.logprobs - rollout.ref_logprobs).mean(),
            "eval/length": rollout.grid.lengths.mean(),
            "eval/truncated_frac": (~generation.ended).double().mean(),
            "eval/win_rate": wins,
        }
        return {name: value.item() for name, value in values.items()}

    def _at_the_start(self, now: Responses) -> tuple[Responses, torch.Tensor]:
        """Return the answers at the start and their scores [B], rescored each time: running statistics move."""
        texts, whole = self.models.tokenizer.batch_decode(self.start_whole, skip_special_tokens=True), self.start_whole
        start = Responses(now.prompts, now.prompt_ids, texts, self.start, self.start_ended, now.columns, whole)
        return start, self.scorer(start, learn=False).totals

    def _users_metrics(self) -> dict[str, float]:
        """Return the metrics of the evaluators; their `generate` maps prompts to completions of the current policy."""
        metrics: dict[str, float] = {}
        for evaluator in self.evaluators:
            with self.models.whole("policy") as policy:
                inputs = {"generate": self._complete, "model": policy, "tokenizer": self.models.tokenizer}
                answer = current().together(lambda: self._numbers(evaluator, inputs))[0]  # noqa: B023  # called here
            metrics |= {f"eval/{name}": float(value) for name, value in answer.items()}
        return metrics

    def _numbers(self, evaluator: Evaluator, inputs: dict[str, object]) -> dict[str, float]:
        answer = call("evaluator", evaluator, **inputs)
        if not isinstance(answer, dict) or not all(isinstance(x, int | float) for x in answer.values()):
            raise UserError(f"evaluator: expected a dict of numbers, got {answer!r}")
        return answer

    def _complete(self, prompts: PromptRows) -> list[str]:
        if isinstance(prompts, str):
            raise UserError(f"evaluator: generate: expected a list of prompts, got {prompts!r}")
        as_given = dataclasses.replace(self.config.data, deduplicate=False, columns=())
        data = load_prompts(prompts, self.models.tokenizer, as_given)
        if data.dropped:
            limit = self.config.data.max_prompt_tokens
            raise UserError(f"evaluator: expected prompts of at most {limit} tokens, got {data.dropped} longer ones")
        return Responses.from_generation(self._answers(data), self.models.tokenizer).completions

    def _answers(self, data: Prompts, rollout_fn: RolloutFunction | None = None) -> Generation:
        rows = list(range(len(data.token_ids)))
        batch = make_batch(data, rows, self.models.pad_id, self.models.device)
        width = self.config.rollout.micro_batch_size or self.config.rollout.batch_size
        seed = noise_seed(self.config.seed, "evaluation")
        return respond(self.models, batch, self._rollout(width), seed, function=rollout_fn)

    def _rollout(self, width: int) -> RolloutConfig:
        return dataclasses.replace(self.config.rollout, micro_batch_size=width, tokens_per_pass=None)

    def state_dict(self) -> State:
        answers = {name: getattr(self, name) for name in ("start", "start_whole", "start_ended")}
        return answers | self.best.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.best.load_state_dict(state)
        for name in ("start", "start_whole", "start_ended"):
            setattr(self, name, state[name])


def load_evaluation(
    config: PPOConfig,
    models: Models,
    scorer: Scorer,
    prompts: str | PromptRows | None = None,
    rollout_fn: RolloutFunction | None = None,
) -> Evaluation | None:
    """Return the evaluation that `config` asks for, if any, on `prompts` or those it names."""
    settings = config.evaluation
    if not settings.every:
        if prompts is not None or settings.prompts is not None:
            warnings.warn("evaluation.every is 0: the held-out prompts are not used", stacklevel=2)
        return None
    source = settings.prompts if prompts is None else prompts
    if source is None:
        raise UserError("evaluation.prompts: expected a file of prompts, got null")
    evaluators = [load_callable(spec, "evaluation.evaluators") for spec in settings.evaluators]
    data = load_prompts(source, models.tokenizer, config.data, "evaluation.prompts")
    return Evaluation(config, models, scorer, data, evaluators, rollout_fn)
