"""Supervised fine-tuning: the loss counts only the tokens of the completions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast import ops
from ppo_fast.rlhf.config.supervised import SFTConfig
from ppo_fast.rlhf.data.examples import Example, completion_example
from ppo_fast.rlhf.models.loading import load_policy, padding_id
from ppo_fast.rlhf.preflight import check_objects, check_supervised
from ppo_fast.rlhf.supervised.train import (
    Objective,
    Source,
    SupervisedResult,
    completion_logprobs,
    fit,
    load_data,
    setup_run,
)
from ppo_fast.rlhf.training.resume import with_kernels


@dataclass(frozen=True)
class SFT(Objective[Example]):
    """-mean log pi(token | all before it) over the tokens of the completions."""

    stage = "SFT"
    linear: bool = True  # log-probabilities without the logits of the batch
    packed: bool = False  # batches without padding

    def loss(self, examples: Sequence[Example]) -> ops.LossOutput:
        batch = self.batch(examples)

        def loss(model: PreTrainedModel) -> ops.LossOutput:
            return ops.LossOutput(-completion_logprobs(model, batch, linear=self.linear, packed=self.packed).mean(), {})

        return self.run(loss)

    def evaluate(self, examples: Sequence[Example]) -> dict[str, float]:
        metrics = super().evaluate(examples)
        return metrics | {"perplexity": math.exp(min(metrics["loss"], 700.0))}


def train_sft(
    config: SFTConfig,
    *,
    train: Source | None = None,
    held_out: Source | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    callbacks: Sequence[object] = (),
    resume: bool | str = False,
) -> SupervisedResult:
    """Fine-tune a causal language model on completions; inputs that are not passed are read from `config`.

    Args:
        config: the run; equal configs and inputs give equal results on one machine.
        train: a path or a name on the Hub, as `data.train`, or rows of one of the forms {"prompt", "completion"},
            {"messages"} and {"text"}.
        held_out: the same, for the evaluation.
        model: a causal LM, trained in place.
        tokenizer: the model's.
        callbacks: objects with any of the methods of :class:`ppo_fast.rlhf.Callback`.
        resume: continue the newest checkpoint in `config.output_dir`, bitwise as if it had never stopped; see
            :func:`ppo_fast.rlhf.train_ppo`. In the config, `optim.epochs` and `log` may differ.

    Raises:
        UserError: an unusable input, a failing callback, a NaN, a full disk; one sentence, which names the step. Saved
            files stay as they are.
        Interrupted: SIGINT or SIGTERM came; a KeyboardInterrupt, raised after the step when a checkpoint is saved.

    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5.
    """
    check_objects(config, SFTConfig, model=model, tokenizer=tokenizer)
    with setup_run(config, resume, callbacks) as start:
        given = model is not None and tokenizer is not None
        check_supervised(config, train, held_out, ("prompt", "completion"), ("messages",), ("text",), given=given)
        loaded = load_policy(with_kernels(config.model, start.checkpoint), start.generator, model, tokenizer)
        make = functools.partial(completion_example, eos_ids=loaded.eos_ids)
        data = load_data(config, make, loaded.tokenizer, start.generator, train, held_out)
        layout = {"linear": config.model.fused_head, "packed": config.model.packing}
        common = (loaded.model, padding_id(loaded.tokenizer), config.optim.width)
        objective = SFT(*common, **layout, adapters=loaded.adapters)
        return fit(config, objective, data, loaded.tokenizer, start)
