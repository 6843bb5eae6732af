"""``ppo-fast quickstart``: all of RLHF on a tiny language model, on a CPU, in minutes, from nothing.

Supervised fine-tuning on restaurant reviews, a reward model from noisy preferences, then PPO against it twice: with
the KL penalty and without. The reward model never saw the texts that PPO finds, so without the penalty its score rises
while the gold score, which only the evaluation sees, falls. The stages are those of the command line, run from files
that the commands read as well. Everything is made locally from the seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from ppo_fast.quickstart import files, show
from ppo_fast.quickstart.judging import Evaluation, Examiner, write_preferences
from ppo_fast.rlhf import UserError, load_config, train_ppo, train_reward_model, train_sft
from ppo_fast.rlhf.config.supervised import RewardModelConfig, SFTConfig
from ppo_fast.rlhf.errors import require
from ppo_fast.rlhf.reports import plots
from ppo_fast.rlhf.training.lock import hold_directory
from ppo_fast.rlhf.training.log import held_artifacts

History = list[dict[str, float]]
RUNS = ("sft", "reward", "ppo", "no-kl")  # directories of the stages


@dataclass(frozen=True)
class Options:
    """What ``ppo-fast quickstart`` can be asked for."""

    out: Path = Path("runs/quickstart")  # directory of everything that is written
    seed: int = 0  # of the language sample, the models and the training
    answers: int = 10_000  # examples of supervised fine-tuning
    pairs: int = 1_000  # preferences for the reward model
    updates: int = 50  # PPO updates of each of the two runs
    overwrite: bool = False  # replace an earlier quickstart in `out`

    def __post_init__(self) -> None:
        for name in ("answers", "pairs", "updates"):
            if getattr(self, name) < 1:
                raise UserError(f"quickstart: expected {name} to be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Result:
    """The three models on the test prompts, and the metrics of every update of the two PPO runs."""

    sft: Evaluation
    with_kl: Evaluation
    without_kl: Evaluation
    histories: dict[str, History]  # "with KL", "without KL"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the quickstart from the command line."""
    defaults = Options()
    about = "Fine-tuning, reward model and PPO of a tiny language model: no download, no GPU, minutes."
    parser = argparse.ArgumentParser(prog="ppo-fast quickstart", description=about)
    parser.add_argument("--out", type=Path, default=defaults.out, help="output directory (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    parser.add_argument("--answers", type=int, default=defaults.answers, help="examples of fine-tuning (%(default)s)")
    parser.add_argument("--pairs", type=int, default=defaults.pairs, help="preferences (%(default)s)")
    parser.add_argument("--updates", type=int, default=defaults.updates, help="PPO updates per run (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart in the directory")
    options = Options(**vars(parser.parse_args(argv)))
    torch.set_num_threads(1)  # two threads are slower than one on a model this small
    require("transformers").utils.logging.disable_progress_bar()
    with hold_directory(options.out):
        run(options)


def run(options: Options) -> Result:
    """Fine-tune, learn the reward, train against it with and without the KL penalty, compare, draw."""
    start, out, console = time.monotonic(), options.out, Console(highlight=False)
    _require_free(options)
    console.print("[bold]1  Supervised fine-tuning[/] on sampled restaurant reviews")
    files.write_inputs(out, options.seed, options.answers, options.updates)
    replace = {"overwrite": options.overwrite}
    train_sft(load_config(out / "sft.yaml", kind=SFTConfig, flags=replace))
    console.print(f"\n[bold]2  Reward model[/] from {options.pairs} noisy preferences between its answers")
    write_preferences(out, options.pairs, options.seed)
    train_reward_model(load_config(out / "reward.yaml", kind=RewardModelConfig, flags=replace))
    console.print("\n[bold]3  PPO[/] against the reward model, with the KL penalty")
    train_ppo(load_config(out / "ppo.yaml", flags=replace))
    console.print("\n[bold]4  The same without the penalty[/]")
    train_ppo(load_config(out / "ppo.yaml", flags=replace | {"kl.coef": 0.0, "output_dir": str(out / "no-kl")}))
    histories = {name: plots.read_metrics(out / run) for name, run in (("with KL", "ppo"), ("without KL", "no-kl"))}
    examiner = Examiner(out, options.seed)
    sft, with_kl, without_kl = (examiner.evaluate(out / name / "final") for name in ("sft", "ppo", "no-kl"))
    result = Result(sft, with_kl, without_kl, histories)
    show_result(result, options, console, start)
    return result


def _require_free(options: Options) -> None:
    """Raise a UserError when a stage in the directory completed something that would be replaced unasked."""
    held = [name for name in RUNS if held_artifacts(options.out / name)]
    if held and not options.overwrite:
        found = f"{str(options.out)!r} already holds the run {held[0]!r}"
        raise UserError(f"quickstart: {found}; choose another (--out DIR) or replace it (--overwrite)")


def show_result(result: Result, options: Options, console: Console, start: float) -> None:
    """Samples, table, picture, and what to do next."""
    sides = {"SFT": result.sft, "PPO with KL": result.with_kl, "PPO without": result.without_kl}
    picture = options.out / "curves.png"
    finding, setting = show.finding(result.sft, result.with_kl, result.without_kl), show.setting(options.seed)
    plots.draw_curves(result.histories, picture, title=finding, subtitle=setting, panels=show.PANELS)
    console.print("\n[bold]5  Result[/]\n", show.sample_table(sides), show.summary_table(sides))
    console.print(show.closing(options.out, time.monotonic() - start), soft_wrap=True, markup=False)
