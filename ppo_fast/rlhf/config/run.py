"""The groups of every run: directory, logs, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ppo_fast.rlhf.config.base import Settings
from ppo_fast.rlhf.errors import check, not_negative, positive


@dataclass(frozen=True)
class RunLogConfig(Settings):
    """What a run shows and records."""

    GROUP = "log"

    tensorboard: bool = True  # event files
    console: bool = True  # progress bar, a line per update, tables of samples
    print_every: int = 1  # updates between lines on the console; 0: only the progress bar
    wandb: str | None = None  # project of Weights & Biases that gets the metrics as well; needs the package wandb

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if isinstance(value, int):
                not_negative(f"log.{name}", value)


@dataclass(frozen=True)
class LogConfig(RunLogConfig):
    """What a PPO run shows and records."""

    samples_every: int = 10  # updates between tables of samples; 0: never
    samples: int = 4  # rows of the table
    all_samples: bool = False  # samples.jsonl takes every response of every update, for `ppo-fast export`


@dataclass(frozen=True)
class CheckpointConfig(Settings):
    """Checkpoints, which a run resumes from."""

    GROUP = "checkpoint"

    every: int = 0  # updates (other stages: optimizer steps) between checkpoints; 0: only when a signal stops the run
    keep: int = 2  # checkpoints kept; 0: all

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            not_negative(f"checkpoint.{name}", value)


@dataclass(frozen=True)
class RunConfig(Settings):
    """What all stages have in common."""

    output_dir: str = "runs"  # config.yaml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/, final/
    overwrite: bool = False  # write over an earlier run in output_dir
    seed: int = 0  # of every random number of the run
    threads: int | None = None  # torch CPU threads during the run; 1 is quickest for tiny models
    max_hours: float | None = None  # of training; the step that ends later is the last: checkpoint, exit, --resume
    ddp_timeout: float = 1800.0  # seconds that a process of torchrun waits for another before the run ends
    push_to_hub: str | None = None  # repository of the Hugging Face Hub that gets final/ at the end: NAME or OWNER/NAME
    on_nan: Literal["stop", "skip"] = "stop"  # at a NaN or a mask of all tokens; skip: leave it out, count it
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.output_dir != "", "output_dir", "the name of a directory", self.output_dir)
        not_negative("seed", self.seed)
        if self.threads is not None:
            positive("threads", self.threads)
        if self.max_hours is not None:
            positive("max_hours", self.max_hours)
        positive("ddp_timeout", self.ddp_timeout)
