"""What a run of supervised fine-tuning, of a reward model or of DPO is."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Literal

from ppo_fast.rlhf.config.base import Settings, check_renames
from ppo_fast.rlhf.config.model import CausalConfig, WeightsConfig
from ppo_fast.rlhf.config.optim import AdamWConfig, check_float16
from ppo_fast.rlhf.config.run import RunConfig, RunLogConfig
from ppo_fast.rlhf.errors import check, divides, not_negative, positive


@dataclass(frozen=True)
class ExamplesConfig(Settings):
    """Training and held-out examples: JSONL, Parquet, a directory that the datasets library saved, or the Hub."""

    GROUP = "data"

    train: str | None = None  # path of the examples, or NAME[:SPLIT] of a Hub dataset
    held_out: str | None = None  # examples never trained on, in the same form; null: a share of train
    columns: tuple[str, ...] = ()  # columns to rename, prompt=question (YAML: {prompt: question})
    subset: str | None = None  # configuration of a Hub dataset
    held_out_frac: float = 0.1  # that share, drawn by the seed; 0: no evaluation
    max_tokens: int = 1024  # prompt and completion; longer examples are dropped and counted
    deduplicate: bool = False  # drop examples that repeat an earlier one, token by token
    bucket: bool = True  # batches of similar length: less padding, the same examples per epoch

    def __post_init__(self) -> None:
        super().__post_init__()
        check_renames(self.columns)
        positive("data.max_tokens", self.max_tokens)
        check(0 <= self.held_out_frac < 1, "data.held_out_frac", "0 <= held_out_frac < 1", self.held_out_frac)


@dataclass(frozen=True)
class SupervisedOptimConfig(AdamWConfig):
    """AdamW over epochs x batches x micro-batches."""

    lr: float = 1e-5  # peak; full fine-tuning: 1e-5, by DPO 1e-6; tiny models: a hundred times that
    epochs: int = 1  # passes over the training examples
    batch_size: int = 16  # examples (pairs) per optimizer step
    micro_batch_size: int | None = None  # per forward pass, same numbers to rounding; divides batch_size; null: all

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size"):
            positive(f"optim.{name}", getattr(self, name))
        if self.micro_batch_size is not None:
            divides("optim.micro_batch_size", self.micro_batch_size, "optim.batch_size", self.batch_size)

    @property
    def width(self) -> int:
        """Examples per forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True)
class SupervisedLogConfig(RunLogConfig):
    """What a run shows and records; its updates are optimizer steps."""

    eval_every: int = 0  # optimizer steps between evaluations on held-out examples; 0: after every epoch


@dataclass(frozen=True)
class BestModelConfig(Settings):
    """The best model by a metric of the held-out examples, and the end of a run that gets no better."""

    GROUP = "evaluation"

    best: str | None = None  # metric by which RUN/best is kept, as eval/loss; null: no such directory
    best_is: Literal["max", "min"] | None = None  # of that metric; null: min of a loss, else max
    patience: int = 0  # evaluations in a row without a better `best` that end the run; 0: none do

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative("evaluation.patience", self.patience)
        watched = self.best is not None
        check(watched or not self.patience, "evaluation.patience", "0 without evaluation.best", self.patience)


@dataclass(frozen=True)
class SupervisedConfig(RunConfig):
    """What the three have in common."""

    model: WeightsConfig = field(default_factory=WeightsConfig)
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    optim: SupervisedOptimConfig = field(default_factory=SupervisedOptimConfig)
    log: SupervisedLogConfig = field(default_factory=SupervisedLogConfig)
    evaluation: BestModelConfig = field(default_factory=BestModelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_float16(self.model, self.optim)


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """One run of supervised fine-tuning on {"prompt", "completion"}, {"messages"} or {"text"}."""

    output_dir: str = "runs/sft"  # config.yaml, metrics.jsonl, tensorboard/, checkpoints/, final/
    model: CausalConfig = field(default_factory=CausalConfig)


@dataclass(frozen=True)
class RewardModelConfig(SupervisedConfig):
    """The training of one reward model on {"prompt", "chosen", "rejected"[, "margin"]}."""

    output_dir: str = "runs/reward"  # config.yaml, metrics.jsonl, tensorboard/, checkpoints/, final/
    init: str | None = None  # reward model to continue from; null: model.path with a new head


@dataclass(frozen=True)
class ValueConfig(RewardModelConfig):
    """The pre-training of one value model on scored responses {"prompt", "completion", "score"[, "ended"]}.

    `data.train` is a file of them, a run, for its samples.jsonl (`log.all_samples`), or the config of a PPO run (YAML,
    TOML), whose policy answers its prompts.
    """

    output_dir: str = "runs/value"  # config.yaml, metrics.jsonl, tensorboard/, checkpoints/, final/
    samples: int = 1024  # responses drawn and scored if data.train is the config of a PPO run
    gamma: float = 1.0  # discount, advantage.gamma of the run to come

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("samples", self.samples)
        check(0 <= self.gamma <= 1, "gamma", "0 <= gamma <= 1", self.gamma)


@dataclass(frozen=True)
class DPOConfig(SupervisedConfig):
    """One run of direct preference optimization on {"prompt", "chosen", "rejected"}."""

    output_dir: str = "runs/dpo"  # config.yaml, metrics.jsonl, tensorboard/, checkpoints/, final/
    beta: float = 0.1  # strength of the implied KL to the reference, which is model.path as it was
    model: CausalConfig = field(default_factory=CausalConfig)
    optim: SupervisedOptimConfig = field(default_factory=functools.partial(SupervisedOptimConfig, lr=1e-6))

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("beta", self.beta)
