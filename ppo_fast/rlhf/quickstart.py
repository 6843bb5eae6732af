"""``ppo-fast quickstart``: a tiny language model learns to write warm restaurant reviews, on a CPU, in a minute.

A base model is fitted to sampled reviews, then trained by PPO with the ordinary trainer, from files that
``ppo-fast train`` reads as well. Everything is made locally from the seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shlex
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from ppo_fast import ops

from . import plots, reviews, tiny
from .config import DataConfig, ModelConfig, RolloutConfig
from .configfile import load_config
from .data import load_prompts, make_batch
from .errors import UserError, require
from .models import load_models
from .ppo import train_ppo
from .rollout import generate, score

CONFIG = """\
# A review scores +1 for each warm word and -1 for each cold one, or -3 if it is not well formed.
updates: {updates}
seed: {seed}
threads: 1
model: {{path: {base}, device: cpu}}
data: {{prompts: {prompts}, max_prompt_tokens: 8}}
reward: {{function: {reward}}}
rollout: {{batch_size: 128, max_new_tokens: {max_new_tokens}}}
kl: {{coef: 0.05}}
optim: {{lr: 4.0e-4, value_lr: 1.0e-3, warmup_frac: 0.1, epochs: 4, minibatch_size: 32}}
log: {{dir: {run}, overwrite: true, tensorboard: false, print_every: 5, samples_every: 0}}
"""
TRAIN_PROMPTS, TEST_PROMPTS, SAMPLES = 512, 256, 6


@dataclass(frozen=True)
class Options:
    """What ``ppo-fast quickstart`` can be asked for."""

    out: Path = Path("runs/quickstart")  # directory of everything that is written
    seed: int = 0  # of the language sample, the model and the training
    updates: int = 50  # PPO updates
    sft_steps: int = 300  # optimizer steps of the base model

    def __post_init__(self) -> None:
        for name in ("updates", "sft_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"quickstart: expected {name} to be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Evaluation:
    """A model's reviews of the test prompts."""

    prompts: list[str]  # [M]
    texts: list[str]  # [M] each prompt with its completion
    kl: float  # KL to the base model, nats per review
    entropy: float  # nats per word

    @property
    def score(self) -> float:
        return _mean(reviews.score(text) for text in self.texts)

    @property
    def valid(self) -> float:
        return _mean(reviews.is_valid(text) for text in self.texts)

    @property
    def words(self) -> float:
        return _mean(len(text.split()) for text in self.texts)


@dataclass(frozen=True)
class Result:
    before: Evaluation  # the base model
    after: Evaluation  # the same after PPO
    history: list[dict[str, float]]  # the metrics of every update


def main(argv: Sequence[str] | None = None) -> None:
    """Run the quickstart from the command line."""
    defaults = Options()
    about = "A tiny language model learns to write warm restaurant reviews: no download, no GPU, about a minute."
    parser = argparse.ArgumentParser(prog="ppo-fast quickstart", description=about)
    parser.add_argument("--out", type=Path, default=defaults.out, help="output directory (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    parser.add_argument("--updates", type=int, default=defaults.updates, help="PPO updates (%(default)s)")
    parser.add_argument(
        "--sft-steps", type=int, default=defaults.sft_steps, help="steps of the base model (%(default)s)"
    )
    options = Options(**vars(parser.parse_args(argv)))
    torch.set_num_threads(1)  # two threads are slower than one on a model this small
    require("transformers").utils.logging.disable_progress_bar()
    run(options)


def run(options: Options) -> Result:
    """Make the base model and the files of the run, train, compare, draw."""
    start, out, console = time.monotonic(), options.out, Console(highlight=False)
    console.print("[bold]1  Base model[/]: fit a tiny Llama to sampled restaurant reviews")
    train_base(options, console)
    write_inputs(options)
    console.print("\n[bold]2  PPO[/]: +1 for a warm word, -1 for a cold one, -3 for a malformed review")
    history = train_ppo(load_config(out / "config.yaml")).history
    before, after = (evaluate(path, out / "base", options.seed) for path in (out / "base", out / "ppo/final"))
    plots.draw_curves({"PPO": history}, out / "curves.png", title=_finding(before, after), subtitle=_setting(options))
    console.print("\n[bold]3  Result[/]\n", sample_table(before, after), summary_table(before, after))
    console.print(closing(out, time.monotonic() - start), soft_wrap=True, markup=False)
    return Result(before, after, history)


def train_base(options: Options, console: Console) -> None:
    """Fit a tiny Llama to sampled reviews by the next-word loss; write it to ``out/base``."""
    rng = random.Random(options.seed)
    tokenizer = tiny.make_tokenizer(reviews.words())
    model = tiny.make_model(len(tokenizer), seed=options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.sft_steps)
    for _ in track(range(options.sft_steps), "next-word loss", console=console):
        texts = [f"{reviews.sample(rng)} {tiny.EOS}" for _ in range(32)]
        loss = next_word_loss(model, tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(options.out / "base")
    tokenizer.save_pretrained(options.out / "base")


def next_word_loss(model: Any, batch: Any) -> torch.Tensor:
    """-mean log pi(word t+1 | words to t), over the words of a right-padded batch."""
    logits = model(**batch).logits[:, :-1]
    mask = batch["attention_mask"][:, 1:].bool()
    return -ops.masked_mean(ops.token_logprobs(logits, batch["input_ids"][:, 1:], mask=mask), mask)


def write_inputs(options: Options) -> None:
    """Write what ``ppo-fast train`` needs beside the model: prompts.jsonl, reward.py and config.yaml."""
    out = options.out.resolve()
    prompts = reviews.sample_prompts(TRAIN_PROMPTS, random.Random(options.seed + 1))
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    shutil.copyfile(reviews.__file__, out / "reward.py")
    paths = {"base": "base", "prompts": "prompts.jsonl", "reward": "reward.py:reward", "run": "ppo"}
    text = CONFIG.format(
        updates=options.updates,
        seed=options.seed,
        max_new_tokens=reviews.MAX_WORDS,
        **{key: json.dumps(str(out / name)) for key, name in paths.items()},
    )
    (out / "config.yaml").write_text(text)


def evaluate(policy: Path, base: Path, seed: int) -> Evaluation:
    """Sample one review to each test prompt and compare the policy with the base model on them."""
    generator = torch.Generator().manual_seed(seed)
    reference = load_models(ModelConfig(path=str(base)), generator).policy
    models = dataclasses.replace(load_models(ModelConfig(path=str(policy)), generator), reference=reference)
    texts = reviews.sample_prompts(TEST_PROMPTS, random.Random(seed + 2))
    prompts = load_prompts(texts, models.tokenizer, DataConfig())
    config = RolloutConfig(batch_size=TEST_PROMPTS, max_new_tokens=reviews.MAX_WORDS)
    batch = make_batch(prompts, list(range(TEST_PROMPTS)), models.pad_id, models.device)
    rollout = score(models, generate(models, batch, config, generator), config)
    completions = models.tokenizer.batch_decode(rollout.generation.responses, skip_special_tokens=True)
    return Evaluation(
        prompts=texts,
        texts=[f"{prompt} {completion}" for prompt, completion in zip(texts, completions, strict=True)],
        kl=float((rollout.logprobs - rollout.ref_logprobs).sum(dim=1).mean()),
        entropy=float(ops.masked_mean(rollout.entropy, rollout.mask)),
    )


def sample_table(before: Evaluation, after: Evaluation) -> Table:
    """The reviews of a few prompts, side by side, warm words in green and cold ones in red."""
    table = Table("base model", "score", "after PPO", "score", title="The same prompts (underlined), before and after")
    rows = {prompt: row for row, prompt in enumerate(before.prompts) if " " in prompt}
    for prompt, row in list(rows.items())[:SAMPLES]:
        cells = []
        for text in (before.texts[row], after.texts[row]):
            cells += [_coloured(prompt, text), Text(f"{reviews.score(text):+.0f}", justify="right")]
        table.add_row(*cells)
    return table


def summary_table(before: Evaluation, after: Evaluation) -> Table:
    """Means over the test prompts."""
    table = Table("", "base model", "after PPO", title=f"{TEST_PROMPTS} new prompts")
    rows = (
        ("score of a review", "{0.score:+.2f}"),
        ("well-formed reviews", "{0.valid:.0%}"),
        ("KL to the base model, nats per review", "{0.kl:.2f}"),
        ("entropy, nats per word", "{0.entropy:.2f}"),
        ("words per review", "{0.words:.1f}"),
    )
    for name, form in rows:
        table.add_row(name, *(Text(form.format(side), justify="right") for side in (before, after)))
    return table


def closing(out: Path, seconds: float) -> str:
    """Where everything lies and what to do next."""
    config, other = (shlex.quote(str(out / name)) for name in ("config.yaml", "no-kl"))
    return f"""
Done in {seconds:.0f} s. Written to {out}:
  curves.png         reward, KL, entropy, clip fraction of every update
  ppo/metrics.jsonl  all metrics of every update
  ppo/final          the trained model, for AutoModelForCausalLM.from_pretrained
  reward.py          the reward function, yours to change

Next: train again without the KL penalty, and see how much further the model drifts

  ppo-fast train --config {config} --kl.coef 0 --log.dir {other}
"""


def _coloured(prompt: str, text: str) -> Text:
    """The review with its prompt underlined, punctuation closed up and words of tone in colour."""
    out = Text()
    for position, word in enumerate(text.split()):
        if position and word not in {".", ","}:
            out.append(" ")
        style = "green" if word in reviews.WARM_WORDS else "red" if word in reviews.COLD_WORDS else ""
        out.append(word, style=f"{style} underline" if position < len(prompt.split()) else style)
    return out


def _finding(before: Evaluation, after: Evaluation) -> str:
    verb = "rose" if after.score > before.score else "fell"
    return f"The score of a review {verb} from {before.score:+.1f} to {after.score:+.1f}"


def _setting(options: Options) -> str:
    task = "a tiny Llama writes restaurant reviews; +1 for a warm word, -1 for a cold one"
    return f"PPO: {task}; seed {options.seed}"


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
