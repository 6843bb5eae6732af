"""Supervised fine-tuning: the loss counts the tokens of the completions alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ppo_fast import ops

from .examples import Example, collate, completion_example
from .models import load_policy, padding_id
from .supervised import Objective, Source, SupervisedResult, completion_logprobs, fit, load_data, prepared
from .supervised_config import SFTConfig


class SFT(Objective[Example]):
    """-mean log pi(token | all before it) over the tokens of the completions."""

    def loss(self, examples: Sequence[Example]) -> ops.LossOutput:
        batch = collate(examples, self.pad_id, self.model.device)
        logprobs = completion_logprobs(self.model, batch)
        return ops.LossOutput(-ops.masked_mean(logprobs, batch.mask[:, 1:]), {})

    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        metrics = super().evaluate(examples)
        return metrics | {"perplexity": math.exp(min(metrics["loss"], 700.0))}


def train_sft(
    config: SFTConfig,
    *,
    train: Source | None = None,
    held_out: Source | None = None,
    model: Any = None,
    tokenizer: Any = None,
) -> SupervisedResult:
    """Fine-tune a causal language model on completions; what is not passed is read from where `config` says.

    Args:
        config: the run; equal configs and inputs give equal results on one machine.
        train: a path, or rows {"prompt", "completion"} or {"messages"}.
        held_out: the same, for the evaluation.
        model: a causal LM, trained in place.
        tokenizer: the one the model was made with.

    Raises:
        UserError: an input that cannot be used, or a loss that is not finite; one sentence.

    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
    """
    with prepared(config) as generator:
        model, tokenizer = load_policy(config.model, generator.device, model, tokenizer)
        data = load_data(config, completion_example, tokenizer, generator, train, held_out)
        objective = SFT(model, padding_id(tokenizer), config.optim.width)
        return fit(config, "SFT", objective, data, tokenizer, generator)
