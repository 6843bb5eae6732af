"""What a person sees at the end: samples side by side, a table, the sentence above the picture, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text

from ppo_fast.quickstart import language
from ppo_fast.quickstart.judging import Evaluation
from ppo_fast.rlhf.errors import printable
from ppo_fast.rlhf.reports.plots import Panel

SAMPLES = 6
PANELS = (
    Panel("objective/scores", "What PPO maximizes: the reward model's score", "standard deviations"),
    Panel("eval/gold", "What we want: the gold score", "mean score of a review"),
    Panel("objective/kl", "KL to the fine-tuned model", "nats per review", floor=0.0),
    Panel("eval/valid", "Well-formed reviews", "% of reviews", scale=100.0, floor=0.0),
)


def sample_table(sides: Mapping[str, Evaluation]) -> Table:
    """The reviews of a few prompts, side by side, warm words in green and cold ones in red."""
    title = "The same prompts (underlined): +1 a warm word, -1 a cold one, -3 a malformed review"
    table = Table(title=title)
    for name in sides:
        table.add_column(name, ratio=1)
        table.add_column("gold", justify="right")
    first = next(iter(sides.values()))
    rows = {prompt: row for row, prompt in enumerate(first.prompts) if " " in prompt}
    for prompt, row in list(rows.items())[:SAMPLES]:
        cells = [(side.texts[row], language.score(side.texts[row])) for side in sides.values()]
        table.add_row(*(cell for text, gold in cells for cell in (_colored(prompt, text), Text(f"{gold:+.0f}"))))
    return table


def summary_table(sides: Mapping[str, Evaluation]) -> Table:
    """Means over the test prompts."""
    count = len(next(iter(sides.values())).prompts)
    table = Table("", *sides, title=f"{count} new prompts")
    rows = (
        ("reward model's score (trained on)", "{0.reward:+.2f}"),
        ("gold score (never seen in training)", "{0.gold:+.2f}"),
        ("well-formed reviews", "{0.valid:.0%}"),
        ("KL to the fine-tuned model, nats per review", "{0.kl:.2f}"),
        ("entropy, nats per word", "{0.entropy:.2f}"),
    )
    for name, form in rows:
        table.add_row(name, *(Text(form.format(side), justify="right") for side in sides.values()))
    return table


def finding(sft: Evaluation, with_kl: Evaluation, without_kl: Evaluation) -> str:
    """The sentence above the picture."""
    gold = (side.gold for side in (sft, with_kl, without_kl))
    return "Gold score: {:+.1f} after fine-tuning, {:+.1f} with the KL penalty, {:+.1f} without".format(*gold)


def setting(seed: int) -> str:
    """The line below it."""
    return f"PPO of a tiny Llama that writes restaurant reviews, against a reward model; seed {seed}"


def closing(out: Path, seconds: float) -> str:
    """Where everything lies and what to do next."""
    ppo, free = (shlex.quote(str(out / name)) for name in ("ppo", "no-kl"))
    config, other, gold = (shlex.quote(str(out / name)) for name in ("ppo.yaml", "stronger", "gold.py"))
    by_gold = shlex.quote(str(out / "by-gold"))
    return f"""
Done in {seconds:.0f} s. Written to {out}:
  curves.png           the two runs over each other
  *.yaml               the stages sft, reward and ppo, as the commands read them
  ppo/metrics.jsonl    all metrics of every update; those of the other in no-kl/
  ppo/final, ppo/best  models for AutoModelForCausalLM.from_pretrained
  gold.py              the language and its gold score

Next: one page of curves, samples and the warnings of reward hacking.
  ppo-fast report {free}

Entropy and repetition of both runs.
  ppo-fast plot {ppo} {free} --metrics objective/entropy hacking/repetition

PPO with a stronger penalty, and against the gold score itself.
  ppo-fast train --config {config} --kl.coef 0.5 --out {other}
  ppo-fast train --config {config} --reward.models null --reward {gold}:reward --out {by_gold}
"""


def _colored(prompt: str, text: str) -> Text:
    """The review with its prompt underlined, punctuation closed up and words of tone in color."""
    out = Text()
    for position, word in enumerate(text.split()):
        if position and word not in {".", ","}:
            out.append(" ")
        style = "green" if word in language.WARM_WORDS else "red" if word in language.COLD_WORDS else ""
        out.append(printable(word), style=f"{style} underline" if position < len(prompt.split()) else style)
    return out
