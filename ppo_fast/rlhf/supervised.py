"""What SFT, reward model and DPO share: one loop over batches of examples, and the completions' log-probabilities."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import torch
from torch import Tensor

from ppo_fast import ops

from .checkpoint import save_model
from .configfile import save_config
from .errors import UserError
from .examples import Batch, Batches, Kind, Make, chunks, load_examples
from .metrics import require_finite
from .models import model_inputs
from .optim import Network, schedule
from .runlog import CHECKPOINTS, FINAL, StageLog, require_free
from .runtime import find_device, named, threads, warn_about_precision
from .supervised_config import SupervisedConfig

Source = str | Path | Iterable[Any]


@dataclass(frozen=True)
class Objective(ABC, Generic[Kind]):
    """What a stage minimises."""

    model: Any  # the module that is trained, saved by `save_pretrained`
    pad_id: int
    width: int  # examples per forward pass of an evaluation

    @abstractmethod
    def loss(self, examples: Sequence[Kind]) -> ops.LossOutput:
        """Mean loss and metrics of the examples, each counted by its `weight`."""

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Kind]) -> dict[str, float]:
        """Loss and metrics of held-out examples, however many."""
        parts = [(share, metrics_of(self.loss(part))) for share, part in weighted(examples, self.width)]
        return {name: value.item() for name, value in mean_metrics(parts).items()}

    def extra_files(self, examples: Sequence[Kind]) -> dict[str, Any]:
        """File name -> JSON to save beside the model; `examples` are the held-out ones."""
        return {}


@dataclass(frozen=True)
class SupervisedResult:
    """What a run returns."""

    directory: Path  # the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/
    model: Path  # the final model directory, for from_pretrained
    history: list[dict[str, float]]  # metrics of every optimizer step, by name
    trained: Any  # the model, in memory


@dataclass(frozen=True)
class Data(Generic[Kind]):
    """The examples of a run."""

    train: list[Kind]
    held_out: list[Kind]  # never trained on; may be empty


@dataclass
class Run(Generic[Kind]):
    """The moving parts of a run and one turn of its loop; `batches`, `network`, `generator`, `taken` are its state."""

    config: SupervisedConfig
    objective: Objective[Kind]
    data: Data[Kind]
    generator: torch.Generator  # every random number of the run
    taken: int = field(default=0, init=False)  # optimizer steps so far

    def __post_init__(self) -> None:
        optim = self.config.optim
        lengths = [example.length for example in self.data.train]
        self.batches = Batches(lengths, optim.batch_size, self.generator, bucket=self.config.data.bucket)
        self.total = optim.epochs * len(self.batches)
        self.network = Network(self.objective.model, optim.lr, optim)

    def step(self) -> dict[str, float]:
        """One optimizer step, and an evaluation when one is due; the metrics of both."""
        start = time.perf_counter()
        examples = [self.data.train[row] for row in self.batches.take()]
        parts = []
        for share, micro in weighted(examples, self.config.optim.width):
            output = self.objective.loss(micro)
            (share * output.loss).backward()
            parts.append((share, metrics_of(output)))
        metrics = mean_metrics(parts)
        require_finite(**metrics)
        factor = schedule(self.taken, self.total, self.config.optim)
        norm = self.network.clip()
        require_finite(grad_norm=norm)
        self.network.step(factor)
        self.taken += 1
        numbers = {f"train/{name}": value.item() for name, value in metrics.items()}
        numbers |= {"grad_norm": norm.item(), "lr": self.network.lr * factor, "epoch": self.taken / len(self.batches)}
        numbers["time/step"] = time.perf_counter() - start
        return numbers | (self._evaluate() if self._evaluation_is_due() else {})

    def _evaluation_is_due(self) -> bool:
        every = self.config.log.eval_every or len(self.batches)
        return bool(self.data.held_out) and (self.taken % every == 0 or self.taken == self.total)

    def _evaluate(self) -> dict[str, float]:
        metrics = self.objective.evaluate(self.data.held_out)
        return {f"eval/{name}": value for name, value in metrics.items()}


@contextlib.contextmanager
def prepared(config: SupervisedConfig) -> Iterator[torch.Generator]:
    """Refuse a directory in use before anything is loaded; then the threads and the generator of the run."""
    require_free(config.log)
    with threads(config.threads):
        yield torch.Generator(find_device(config.model.device)).manual_seed(config.seed)


def load_data(
    config: SupervisedConfig,
    make: Make[Kind],
    tokenizer: Any,
    generator: torch.Generator,
    train: Source | None,
    held_out: Source | None,
) -> Data[Kind]:
    """The examples given, or those that `config` names in place of None; a share of train when none are held out."""
    train = config.data.train if train is None else train
    held_out = config.data.held_out if held_out is None else held_out
    examples = load_examples(train, "train", make, tokenizer, config.data)
    if held_out is not None:
        return Data(examples, load_examples(held_out, "held_out", make, tokenizer, config.data))
    count = round(config.data.held_out_frac * len(examples))
    order = torch.randperm(len(examples), generator=generator, device=generator.device).tolist()
    data = Data([examples[row] for row in order[count:]], [examples[row] for row in order[:count]])
    if not data.train:
        raise UserError(f"data.held_out_frac: expected a share that leaves examples to train on, got all {count}")
    return data


def fit(
    config: SupervisedConfig,
    stage: str,
    objective: Objective[Kind],
    data: Data[Kind],
    tokenizer: Any,
    generator: torch.Generator,
) -> SupervisedResult:
    """The loop: optimizer steps over the epochs, evaluations, saved models."""
    _check_fit(objective.model, data)
    warn_about_precision(objective.model, config.optim)
    run = Run(config, objective, data, generator)
    with StageLog(config.log, stage, run.total) as log:
        save_config(config, log.directory / "config.yaml")
        for step in range(1, run.total + 1):
            with named(f"step {step}"):
                log.write(step, run.step())
            if config.log.save_every and step % config.log.save_every == 0:
                save_model(objective.model, tokenizer, log.directory / CHECKPOINTS / f"step-{step:06d}")
        extra = objective.extra_files(data.held_out)
        final = save_model(objective.model, tokenizer, log.directory / FINAL, extra)
    return SupervisedResult(log.directory, final, log.history, objective.model)


def weighted(examples: Sequence[Kind], width: int) -> Iterator[tuple[float, Sequence[Kind]]]:
    """Micro-batches of `width` examples with their shares of the whole weight, so that means of parts add up."""
    total = sum(example.weight for example in examples)
    for micro in chunks(examples, width):
        yield sum(example.weight for example in micro) / total, micro


def metrics_of(output: ops.LossOutput) -> dict[str, Tensor]:
    """The loss among its metrics: 0-d detached tensors."""
    return {"loss": output.loss.detach()} | output.metrics


def mean_metrics(parts: Sequence[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Metrics of several micro-batches, each with its share, as those of all of them."""
    return {name: torch.stack([share * part[name] for share, part in parts]).sum() for name in parts[0][1]}


def completion_logprobs(model: Any, batch: Batch) -> Tensor:
    """Log-probabilities [B, L-1] float32 of tokens 1 to L-1 given those before them; 0 where no completion.

    They come from the hidden states and the weight of the head: the logits of the batch never exist.
    """
    inputs = model_inputs(model.base_model, batch.input_ids, batch.attention_mask)
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return ops.linear_token_stats(
        hidden[:, :-1],
        head.weight,
        batch.input_ids[:, 1:],
        bias=getattr(head, "bias", None),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        mask=batch.mask[:, 1:],
    ).logprobs


def _check_fit(model: Any, data: Data[Any]) -> None:
    """The model has a position and an embedding for every token."""
    examples = [*data.train, *data.held_out]
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(example.length for example in examples)
    if limit is not None and longest > limit:
        raise UserError(f"data.max_tokens: expected at most {limit}, the model's context, for examples of {longest}")
    known = len(model.get_input_embeddings().weight)
    highest = max(example.highest for example in examples)
    if highest >= known:
        raise UserError(f"tokenizer: expected ids below {known}, the tokens that the model knows, got {highest}")
