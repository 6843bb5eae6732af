"""A run's scored samples as preference pairs, to train the next reward model on."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ppo_fast.rlhf.data.templates import TEMPLATE_COLUMNS
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.files import write_result
from ppo_fast.rlhf.training.log import SAMPLES, Record, sample_records

PAIRS = "pairs.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    """``ppo-fast export RUN [--out FILE]``."""
    parser = argparse.ArgumentParser("ppo-fast export", description="Write a run's scored samples as preference pairs.")
    parser.add_argument("run", help="directory of a run with rollout.samples_per_prompt > 1 and log.all_samples")
    parser.add_argument("--out", help="JSONL file; RUN/pairs.jsonl when not given")
    options = parser.parse_args(argv)
    print(f"pairs: {export_pairs(options.run, options.out)}")


def export_pairs(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the best and the worst response to each prompt of each update as {"prompt", "chosen", "rejected"}.

    The scores before clip and penalties decide, and go along as "score_chosen" and "score_rejected"; so do the columns
    that the chat template is given. A response without text is left out. Messages get messages: an answer of the
    assistant's.

    Args:
        run: directory of a run with several responses per prompt (`rollout.samples_per_prompt`) and all of them
            saved (`log.all_samples`).
        out: JSONL file; None: pairs.jsonl in the run.

    Raises:
        UserError: there is no such run, a line of its samples is broken, no prompt in it has two responses of different
            scores, or `out` cannot be written.
    """
    source = Path(run) / SAMPLES
    if not source.is_file():
        raise UserError(f"export: expected a run with {SAMPLES}, got {str(run)!r}")
    target = Path(out or Path(run) / PAIRS)
    pairs = list(_pairs(source))
    if not pairs:
        raise UserError(
            f"export: expected responses of different scores to one prompt in {str(source)!r}, got none; "
            "set rollout.samples_per_prompt to 2 or more and log.all_samples"
        )
    write_result("export", target, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    return target


def _pairs(source: Path) -> Iterator[Record]:
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in sample_records(source, "update", "prompt", "completion", "score"):
        if not record["completion"].strip():
            continue
        asked = {name: record[name] for name in ("prompt", *TEMPLATE_COLUMNS) if name in record}
        groups.setdefault((record["update"], json.dumps(asked)), []).append(record)
    for (_, question), group in groups.items():
        ordered = sorted(group, key=_score)
        rejected, chosen = ordered[0], ordered[-1]
        if _score(chosen) > _score(rejected) and chosen["completion"] != rejected["completion"]:
            yield json.loads(question) | {
                "chosen": _answer(chosen),
                "rejected": _answer(rejected),
                "score_chosen": _score(chosen),
                "score_rejected": _score(rejected),
            }


def _score(record: Record) -> float:
    """Return the score before clip and penalties; earlier versions recorded only the score."""
    own, score = record.get("unpenalized"), float(record["score"])
    return float(own) if isinstance(own, int | float) else score


def _answer(record: Record) -> object:
    text = record["completion"]
    return text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]
