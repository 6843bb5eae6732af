"""Reward models: a causal backbone with a scalar head, trained on preference pairs by Bradley-Terry."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast import ops
from ppo_fast.rlhf.config.supervised import RewardModelConfig
from ppo_fast.rlhf.data.examples import Batch, Pair, preference_pair
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.loading import (
    GENERATION,
    Loaded,
    checked_tokenizer,
    disable_dropout,
    load_causal,
    load_tokenizer,
    padding_id,
    saved_eos_ids,
    with_adapters,
)
from ppo_fast.rlhf.models.networks import networks_of_rank
from ppo_fast.rlhf.models.reward import add_score_head
from ppo_fast.rlhf.models.saved import STATS, SavedModel
from ppo_fast.rlhf.models.value import ValueModel, sequence_scores
from ppo_fast.rlhf.preflight import check_objects, check_supervised
from ppo_fast.rlhf.supervised.train import Objective, Source, SupervisedResult, fit, load_data, setup_run
from ppo_fast.rlhf.training.resume import with_kernels
from ppo_fast.rlhf.world import by_all_ranks

QUANTILES, BINS = (0.05, 0.25, 0.5, 0.75, 0.95), 10


@dataclass(frozen=True)
class RewardModel(Objective[Pair]):
    """-mean log sigmoid(chosen - rejected - margin); see :func:`ppo_fast.preference_loss`."""

    stage = "reward model"
    eos_ids: tuple[int, ...] = ()  # that end a completion

    def scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Return the scores [B] of the chosen and of the rejected, each at its last counted token, the EOS."""
        return self.run(self._scores, self.batch(pairs))

    def loss(self, pairs: Sequence[Pair]) -> ops.LossOutput:
        batch, margins = self.batch(pairs), self._margins(pairs)
        return self.run(lambda model: ops.preference_loss(*self._scores(model, batch), margin=margins))

    @staticmethod
    def _scores(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        network = ValueModel.from_classifier(model)
        chosen, rejected = sequence_scores(network, batch.input_ids, batch.attention_mask).chunk(2)
        return chosen, rejected

    def evaluate(self, pairs: Sequence[Pair]) -> dict[str, float]:
        return self._metrics(pairs, *self._all_scores(pairs))

    def _metrics(self, pairs: Sequence[Pair], chosen: Tensor, rejected: Tensor) -> dict[str, float]:
        output = ops.preference_loss(chosen, rejected, margin=self._margins(pairs))
        scores = torch.cat([chosen, rejected])
        return {
            "loss": output.loss.item(),
            **{name: value.item() for name, value in output.metrics.items()},
            "ece": calibration_error(reliability(chosen - rejected)),
            "score_mean": scores.mean().item(),
            "score_std": scores.std(correction=0).item(),
        }

    def extra_files(self, pairs: Sequence[Pair]) -> dict[str, object]:
        """Return the EOS tokens, and mean, std and quality of the scores of the held-out pairs."""
        files: dict[str, object] = {GENERATION: {"eos_token_id": [*self.eos_ids]}}
        if not pairs:
            return files
        chosen, rejected = self._all_scores(pairs)
        metrics = self._metrics(pairs, chosen, rejected)
        quantiles = torch.cat([chosen, rejected]).quantile(
            torch.tensor(QUANTILES, dtype=chosen.dtype, device=chosen.device)
        )
        stats = {
            "mean": metrics.pop("score_mean"),
            "std": metrics.pop("score_std"),
            "quantiles": dict(zip(map(str, QUANTILES), quantiles.tolist(), strict=True)),
            "pairs": len(pairs),
            **metrics,
            "reliability": reliability(chosen - rejected),
        }
        return files | {STATS: stats}

    @torch.no_grad()
    def _all_scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.gathered(lambda part: torch.stack(self.scores(part), dim=1), pairs).double().unbind(1)
        return chosen, rejected

    def _margins(self, pairs: Sequence[Pair]) -> Tensor:
        return torch.tensor([pair.margin for pair in pairs], dtype=torch.float32, device=self.model.device)


def train_reward_model(
    config: RewardModelConfig,
    *,
    train: Source | None = None,
    held_out: Source | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[object] = (),
    resume: bool | str = False,
) -> SupervisedResult:
    """Train a reward model on preference pairs; inputs that are not passed are read from `config`.

    The result is a model for AutoModelForSequenceClassification and its `reward_stats.json`.

    Args:
        config: the run; equal configs and inputs give equal results on one machine.
        train: a path or a name on the Hub, as `data.train`, or rows {"prompt", "chosen", "rejected"[, "margin"]}.
        held_out: the same, for the evaluation and the statistics.
        model: a causal LM, whose backbone gets a new head; trained in place.
        tokenizer: the model's.
        callbacks: objects with any of the methods of :class:`ppo_fast.rlhf.Callback`.
        resume: continue the newest checkpoint in `config.output_dir`, bitwise as if it had never stopped; see
            :func:`ppo_fast.rlhf.train_ppo`. In the config, `optim.epochs` and `log` may differ.

    Raises:
        UserError: an unusable input, a failing callback, a NaN, a full disk; one sentence, which names the step. Saved
            files stay as they are.
        Interrupted: SIGINT or SIGTERM came; a KeyboardInterrupt, raised after the step when a checkpoint is saved.

    Source: Stiennon et al. 2020, arXiv:2009.01325; Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
    """
    check_objects(config, RewardModelConfig, model=model, tokenizer=tokenizer)
    with setup_run(config, resume, callbacks) as start:
        given = model is not None and tokenizer is not None
        check_supervised(config, train, held_out, ("chosen", "rejected"), given=given)
        weights = dataclasses.replace(config, model=with_kernels(config.model, start.checkpoint))
        loaded = load_scalar_model(weights, start.generator, model, tokenizer)
        make = functools.partial(preference_pair, eos_ids=loaded.eos_ids)
        data = load_data(config, make, loaded.tokenizer, start.generator, train, held_out)
        common = (loaded.model, padding_id(loaded.tokenizer), config.optim.width)
        objective = RewardModel(*common, eos_ids=loaded.eos_ids, adapters=loaded.adapters)
        return fit(config, objective, data, loaded.tokenizer, start)


@by_all_ranks
def load_scalar_model(
    config: RewardModelConfig,
    generator: torch.Generator,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Loaded:
    """Load the model at `init`, or `model` with a new head; with adapters the head is trained too, in float32."""
    if config.init is None:
        loaded = load_causal(config.model, generator.device, model, tokenizer)
        loaded = dataclasses.replace(loaded, model=add_score_head(loaded.model, loaded.tokenizer, generator))
    else:
        if config.model.load_in_4bit:
            raise UserError("model.load_in_4bit: expected false with init, got True")
        saved = SavedModel("init", config.init, config.model.trust_remote_code)
        networks = networks_of_rank(config.model, generator.device)
        model = networks.classifier(saved)
        if model is None:
            raise UserError(f"init: expected a reward model, got another kind of model in {config.init!r}")
        tokenizer = load_tokenizer(saved) if tokenizer is None else checked_tokenizer(tokenizer)
        networks.place(disable_dropout(model))
        loaded = Loaded(model, tokenizer, saved.adapter, eos_ids=saved_eos_ids(config.init, tokenizer, model.config))
    loaded = with_adapters(loaded, config.model, generator)
    if loaded.adapters is not None:
        loaded.model.score.float().requires_grad_(True)
    return loaded


def reliability(gaps: Tensor) -> list[dict[str, float]]:
    """Bin pairs by the confidence of the model, max(p, 1 - p) with p = sigmoid(gap), into `BINS` from 0.5 to 1.

    Each bin that holds pairs gives their mean confidence, their accuracy and their count; gaps are [M],
    chosen - rejected.
    """
    confidence = torch.sigmoid(gaps.abs())
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    rows = []
    for number in bins.unique().tolist():
        inside = bins == number
        rows.append(
            {
                "confidence": confidence[inside].mean().item(),
                "accuracy": (gaps[inside] > 0).double().mean().item(),
                "count": int(inside.sum()),
            }
        )
    return rows


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: mean |accuracy - confidence| over the pairs.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3.
    """
    total = sum(row["count"] for row in bins)
    return sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in bins) / total
