"""The loop of SFT, reward model and DPO over batches of examples, and log-probabilities of completions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast import ops
from ppo_fast.rlhf.config.files import save_config
from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.config.supervised import BestModelConfig, SupervisedConfig
from ppo_fast.rlhf.data.examples import Batch, Batches, Kind, Make, chunks, collate, load_examples, sequences
from ppo_fast.rlhf.errors import BatchError, NotFiniteError, UserError
from ppo_fast.rlhf.models.adapters import Adapters
from ppo_fast.rlhf.models.forward import response_stats
from ppo_fast.rlhf.models.loading import recomputing
from ppo_fast.rlhf.models.networks import equip
from ppo_fast.rlhf.models.sharding import Root, shard
from ppo_fast.rlhf.reports.card import check_hub, publish
from ppo_fast.rlhf.training.best import BestModel
from ppo_fast.rlhf.training.callbacks import Callback, Objects, StepRecord, UserCallback, user_callbacks
from ppo_fast.rlhf.training.checkpoint import Checkpoint, load_saved, save_model, write_model
from ppo_fast.rlhf.training.failures import save_batch
from ppo_fast.rlhf.training.finite import check_metrics, require_finite
from ppo_fast.rlhf.training.lock import hold_directory
from ppo_fast.rlhf.training.log import BEST, FINAL, StageLog, require_free
from ppo_fast.rlhf.training.loop import TrainingLoop, describe_model
from ppo_fast.rlhf.training.loss_scale import LossScale
from ppo_fast.rlhf.training.optim import ClippedOptimizer, schedule
from ppo_fast.rlhf.training.resume import inputs, load_start, report_write_errors, with_kernels
from ppo_fast.rlhf.training.runtime import Stopwatch, find_device, threads, warn_about_precision
from ppo_fast.rlhf.training.signals import StopSignals
from ppo_fast.rlhf.training.state import Stateful
from ppo_fast.rlhf.training.utilization import Utilization, matmul_rate, training_work
from ppo_fast.rlhf.world import current, join

Source = str | Path | Iterable[Mapping[str, object]]


@dataclass(frozen=True)
class Objective(ABC, Generic[Kind]):
    """The loss that a stage minimizes."""

    stage: ClassVar[str]  # its name
    model: PreTrainedModel  # the module that is trained, saved by `save_pretrained`
    pad_id: int
    width: int  # examples per forward pass of an evaluation
    adapters: Adapters | None = field(default=None, kw_only=True)  # what is trained of it; None: all of it

    @abstractmethod
    def loss(self, examples: Sequence[Kind]) -> ops.LossOutput:
        """Mean loss and metrics of the examples, each counted by its `weight`, by `run`."""

    @functools.cached_property
    def root(self) -> Root:
        """The network that is trained, as a root of weights that are gathered together."""
        return Root(model=self.model)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return function(model, ...) with the weights that it needs gathered; see :meth:`Root.run`."""
        return self.root.run("model", function, *args)

    def split(self, config: WeightsConfig) -> None:
        """Split the weights over the ranks, if they are a process group, and equip the network as `config` says."""
        mesh = current().mesh
        if mesh is not None:
            shard(self.root, mesh)
            fused = getattr(config, "fused_head", False)
            equip(self.model, config, self.run, self.model.device, linear=fused)

    def begin(self, examples: Sequence[Kind]) -> None:
        """Measure what the metrics after the run are compared with; `examples` are the held-out ones."""

    @property
    def extra_work(self) -> int:
        """Operations on a token by other networks than the trained one."""
        return 0

    def batch(self, examples: Sequence[Kind]) -> Batch:
        """Return the examples padded; pairs give [2B, L], all the chosen ones first."""
        return collate(sequences(examples), self.pad_id, self.model.device)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[Kind]) -> dict[str, float]:
        """Return loss and metrics of any number of held-out examples."""
        parts = [(share, metrics_of(self.loss(part))) for share, part in weighted(examples, self.width)]
        return {name: value.item() for name, value in mean_metrics(parts).items()}

    @torch.no_grad()
    def gathered(self, function: Callable[[Sequence[Kind]], Tensor], examples: Sequence[Kind]) -> Tensor:
        """Return function(part) [n, ...] of all parts of the examples, in order; each rank computes its share."""
        parts = [(share, function(part)) for share, part in weighted(examples, self.width)]
        own = [found for share, found in parts if share]
        return current().concatenate(torch.cat(own or [parts[0][1][:0]]))

    def extra_files(self, examples: Sequence[Kind]) -> dict[str, object]:
        """Return file name -> JSON, to save with the model; `examples` are the held-out ones."""
        return {}


@dataclass(frozen=True)
class SupervisedResult:
    """The result of a run."""

    directory: Path  # the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/
    model: Path  # the final model directory, for from_pretrained
    history: list[dict[str, float]]  # metrics of every optimizer step, by name
    trained: PreTrainedModel  # the model, in memory


@dataclass(frozen=True)
class Data(Generic[Kind]):
    """The examples of a run."""

    train: list[Kind]
    held_out: list[Kind]  # never trained on; may be empty


@dataclass(frozen=True)
class Start:
    """Where a run starts or continues."""

    generator: torch.Generator
    checkpoint: Checkpoint | None  # None: a new run
    callbacks: Sequence[UserCallback]


@dataclass(frozen=True)
class ExampleBatch(Generic[Kind]):
    """The examples of one optimizer step."""

    rows: list[int]  # of the training examples
    examples: list[Kind]


@dataclass
class SupervisedEvaluation(Callback, Generic[Kind]):
    """Evaluates on the held-out examples every `every` steps and after the last, also where a batch was skipped.

    The best model by `evaluation.best` is written as the final one is.
    """

    objective: Objective[Kind]
    examples: list[Kind]
    every: int
    best: BestModel
    save: Callable[[Path], object]
    phase, collective = "evaluation", True

    def on_start(self, record: StepRecord) -> None:
        """Check `evaluation.best` on one example, before any step."""
        if self.best.metric is None:
            return
        if not self.examples:
            raise UserError(f"evaluation.best: expected null without held-out examples, got {self.best.metric!r}")
        self.best.check([f"eval/{name}" for name in self.objective.evaluate(self.examples[:1])])

    def on_step(self, record: StepRecord) -> StepRecord | None:
        done = record.step + 1
        if not self.examples or (done % self.every and done != record.total):
            return None
        metrics = {f"eval/{name}": value for name, value in self.objective.evaluate(self.examples).items()}
        check_metrics(metrics)
        note = self.best.update(metrics, record.directory / BEST, self.save)
        return record.adding(metrics, *filter(None, [note]))


@dataclass
class SupervisedRun(TrainingLoop, Generic[Kind]):
    """The state of a supervised run, and one step of it."""

    config: SupervisedConfig
    objective: Objective[Kind]
    data: Data[Kind]
    tokenizer: PreTrainedTokenizerBase
    generator: torch.Generator  # every random number of the run
    callbacks: Sequence[UserCallback] = ()
    length = "steps of optim.epochs"

    def __post_init__(self) -> None:
        optim = self.config.optim
        lengths = [example.length for example in self.data.train]
        self.batches = Batches(lengths, optim.batch_size, self.generator, bucket=self.config.data.bucket)
        self.total = optim.epochs * len(self.batches)
        self.network = ClippedOptimizer(self.objective.model.parameters(), optim.lr, optim)
        self.loss_scale = LossScale(self.objective.model.dtype, self.generator.device)
        work = training_work(self.objective.model) + self.objective.extra_work
        rate = matmul_rate(self.generator.device, self.objective.model.dtype)
        self.utilization = Utilization(rate, {"step": work})
        examples = {"training examples": self.data.train, "held-out examples": self.data.held_out}
        self.inputs = inputs(self.objective.model, examples)
        every = self.config.log.eval_every or len(self.batches)
        held_out, best = self.data.held_out, best_model(self.config.evaluation)
        self.evaluation: SupervisedEvaluation[Kind] = SupervisedEvaluation(
            self.objective, held_out, every, best, self.save_model
        )
        self.watch = Stopwatch(self.generator.device, peaks=bool(self.callbacks))

    def step(self, index: int, log: StageLog) -> StepRecord:
        """Take optimizer step `index`, from 0."""
        rows, watch = self.batches.take(), self.watch
        batch = ExampleBatch(rows, [self.data.train[row] for row in rows])
        metrics, notes = dict[str, float](), list[str]()
        watch.restart()
        try:
            with watch("step"):
                metrics = self._train(index, batch.examples)
            metrics["time/step"] = watch.seconds["step"]
            tokens = sum(part.length for example in batch.examples for part in example.parts)
            metrics["tokens_per_second"] = tokens / max(watch.seconds["step"], 1e-9)
            metrics |= self.utilization.metrics(tokens / current().size, {}, watch.seconds)
        except NotFiniteError as error:
            notes.append(self.give_up(index, log, error, functools.partial(self._save_failure, batch)))
        return dataclasses.replace(
            self.record,
            step=index,
            metrics=metrics,
            notes=tuple(notes),
            seconds=watch.seconds,
            memory=watch.memory,
            batch=batch,
            skipped=self.skipped,
        )

    def _train(self, index: int, examples: Sequence[Kind]) -> dict[str, float]:
        """Take the step and return its metrics; NotFiniteError, with nothing changed, when one is not finite."""
        parts = list[tuple[float, dict[str, Tensor]]]()
        for share, micro in weighted(examples, self.config.optim.width):
            with recomputing(self.objective.model):
                output = self.objective.loss(micro)
                self.loss_scale.scale(share * output.loss).backward()
            parts.append((share, metrics_of(output)))
        metrics: dict[str, Tensor] = mean_metrics(parts)
        norm = self.network.clip(self.loss_scale.factor)
        failed = ~torch.stack([value.isfinite() for value in [*metrics.values(), norm]]).all()
        factor = schedule(index, self.total, self.config.optim)
        self.network.step(factor, failed)
        self.loss_scale.update(norm)
        numbers = {f"train/{name}": value.item() for name, value in metrics.items()}
        numbers |= {"grad_norm": norm.item(), "lr": self.network.lr * factor}
        numbers |= {"epoch": (index + 1) / len(self.batches)}
        if self.loss_scale.enabled and self.loss_scale.value >= 1:
            overflows = not norm.isfinite()
            require_finite(**metrics)
            numbers |= {"float16/loss_scale": self.loss_scale.value, "float16/skipped_steps": float(overflows)}
            return numbers | ({"grad_norm": 0.0} if overflows else {})
        require_finite(**metrics, grad_norm=norm)
        return numbers

    def _save_failure(self, failed: ExampleBatch[Kind], target: Path, error: BatchError) -> Path:
        """Write the weights, and the examples of the batch with their texts; all chosen ones before the rejected."""
        both = sequences(failed.examples)
        record = {
            "error": str(error),
            "rows": failed.rows,
            "examples": [dataclasses.asdict(example) for example in failed.examples],
            "prompts": self.tokenizer.batch_decode([example.ids[: example.start] for example in both]),
            "completions": self.tokenizer.batch_decode([example.ids[example.start :] for example in both]),
        }
        batch = vars(self.objective.batch(failed.examples))
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        return save_batch(target, self._write, tensors, record)

    def describe(self) -> list[str]:
        model, data, optim = self.objective.model, self.data, self.config.optim
        counts = f"{len(data.train):,} examples, {len(data.held_out):,} held out"
        kept = "packed" if getattr(self.config.model, "packing", False) else ""
        lora = f"adapters of rank {self.config.model.lora.rank}" if self.objective.adapters is not None else ""
        return [
            describe_model(model, model.parameters(), lora, kept),
            f"{counts}; {self.total:,} steps of {optim.batch_size}; output in {self.config.output_dir}",
        ]

    def save_model(self, directory: Path) -> Path:
        """Write the model with the files of its objective; adapters merged if the config says so."""
        objective, merge = self.objective, self.config.model.lora.merge
        extra = objective.extra_files(self.data.held_out)
        return save_model(objective.model, self.tokenizer, directory, extra, objective.adapters, merge=merge)

    def _finished(self) -> bool:
        return super()._finished() or self.evaluation.best.exhausted

    def _objects(self) -> Objects:
        return {"models": self.objective.model, "tokenizer": self.tokenizer}

    def _own_callbacks(self) -> list[Callback]:
        return [self.evaluation]

    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful] = {"batches": self.batches, "network": self.network}
        if self.loss_scale.enabled:
            parts["loss_scale"] = self.loss_scale
        if self.evaluation.best.metric is not None:
            parts["best"] = self.evaluation.best
        return parts

    def _write(self, directory: Path) -> None:
        write_model(self.objective.model, self.tokenizer, directory, self.objective.adapters)

    def _load(self, directory: Path) -> None:
        load_saved(self.objective.model, directory, self.objective.adapters)


@contextlib.contextmanager
def setup_run(config: SupervisedConfig, resume: bool | str, callbacks: Sequence[object]) -> Iterator[Start]:
    """Refuse a directory in use, or another run's, before loading; then set threads and make the generator."""
    with (
        join(config.model.device, config.ddp_timeout),
        hold_directory(config.output_dir),
        threads(config.threads),
    ):
        users = user_callbacks(callbacks)
        if resume in (False, None):
            current().on_main(lambda: require_free(config))
        current().on_main(lambda: check_hub(config))
        checkpoint = load_start(config, resume, "optim.epochs")
        yield Start(torch.Generator(find_device(config.model.device)).manual_seed(config.seed), checkpoint, users)


def load_data(
    config: SupervisedConfig,
    make: Make[Kind],
    tokenizer: PreTrainedTokenizerBase,
    generator: torch.Generator,
    train: Source | None,
    held_out: Source | None,
) -> Data[Kind]:
    """Return the examples passed or named in `config`; if none are held out, a share of train is."""
    train = config.data.train if train is None else train
    held_out = config.data.held_out if held_out is None else held_out
    examples = load_examples(train, "train", make, tokenizer, config.data)
    if held_out is not None:
        return Data(examples, load_examples(held_out, "held_out", make, tokenizer, config.data))
    count = round(config.data.held_out_frac * len(examples))
    device = generator.device
    order = torch.randperm(len(examples), generator=generator, dtype=torch.int64, device=device).tolist()
    data = Data([examples[row] for row in order[count:]], [examples[row] for row in order[:count]])
    if not data.train:
        raise UserError(f"data.held_out_frac: expected a share that leaves examples to train on, got all {count}")
    return data


def fit(
    config: SupervisedConfig,
    objective: Objective[Kind],
    data: Data[Kind],
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
) -> SupervisedResult:
    """Run the loop and save the model."""
    _check_fit(objective.model, data)
    if objective.adapters is not None and config.optim.master_weights is False:
        objective.adapters.drop_masters()
    warn_about_precision(objective.model, config.optim)
    objective.split(with_kernels(config.model, start.checkpoint))
    objective.begin(data.held_out)
    run = SupervisedRun(config, objective, data, tokenizer, start.generator, start.callbacks)
    checkpoint = start.checkpoint
    if checkpoint is not None:
        run.restore(checkpoint)
    log = StageLog(config, objective.stage, run.total, resume=checkpoint.state["log"] if checkpoint else None)
    with report_write_errors(log.directory), log, StopSignals(log.unit, config.max_hours) as stop:
        current().on_main(lambda: save_config(config, log.directory / "config.yaml"))
        run.loop(log, stop)
        final = run.save_model(log.directory / FINAL)
        publish(final, log, objective.model)
        run.end()
    return SupervisedResult(log.directory, final, log.history, objective.model)


def best_model(config: BestModelConfig) -> BestModel:
    """Return what keeps the best model; without `best_is` less of a loss is better, and more of anything else."""
    lowest = config.best_is == "min" or (config.best_is is None and (config.best or "").endswith("loss"))
    return BestModel(config.best, highest=not lowest, patience=config.patience)


def weighted(examples: Sequence[Kind], width: int) -> Iterator[tuple[float, Sequence[Kind]]]:
    """Yield this rank's micro-batches of `width` examples with their shares of the whole weight: means of parts add up.

    Every rank yields as many: one with fewer repeats its last with share 0.
    """
    world, total = current(), sum(example.weight for example in examples)
    shares = [examples[part.start : part.stop] for part in world.shares(len(examples))]
    split = [list(chunks(share, width)) for share in shares]
    own, count = split[world.rank], max(map(len, split))
    for micro in own:
        yield sum(example.weight for example in micro) / total, micro
    for _ in range(count - len(own)):
        yield 0.0, (own or [examples[:1]])[-1]


def metrics_of(output: ops.LossOutput) -> dict[str, Tensor]:
    """Return loss and metrics: 0-d detached tensors."""
    return {"loss": output.loss.detach()} | output.metrics


def mean_metrics(parts: Sequence[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Combine the metrics of the micro-batches of all ranks, each with its share; each rank passes its own."""
    sums = {name: torch.stack([share * part[name] for share, part in parts]).sum() for name in parts[0][1]}
    return {name: current().sum(value) for name, value in sums.items()}


def completion_logprobs(model: PreTrainedModel, batch: Batch, *, linear: bool = True, packed: bool = False) -> Tensor:
    """Return log-probabilities [N] float32 of the tokens of the completions given those before them, row by row.

    With `linear` they come from the hidden states and the weight of the head: the logits of the batch never exist.
    """
    grid, rows = batch.grid, np.arange(len(batch.grid.ids))
    targets = grid.ids.flatten().index_select(0, grid.flat_indices(rows))
    return response_stats(model, grid.sequences(rows, packed=packed), targets, linear=linear).logprobs


def _check_fit(model: PreTrainedModel, data: Data[Kind]) -> None:
    """Raise a UserError unless the model has a position and an embedding for every token."""
    examples = [*data.train, *data.held_out]
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(example.length for example in examples)
    if limit is not None and longest > limit:
        raise UserError(f"data.max_tokens: expected at most {limit}, the model's context, for examples of {longest}")
    known = len(model.get_input_embeddings().weight)
    highest = max(example.highest for example in examples)
    if highest >= known:
        raise UserError(f"tokenizer: expected ids below {known}, the tokens that the model knows, got {highest}")
