"""Write GSM8K as prompts: ``python recipes/gsm8k.py --out runs/gsm8k`` makes train.jsonl and test.jsonl from the hub.

The answer stays in its column, "... #### 72", whose last number `ppo_fast.rewards:numeric_answer` reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

INSTRUCTION = "Think step by step and write the final number in \\boxed{}."


def as_prompt(row: Mapping[str, str]) -> dict[str, object]:
    """A row of GSM8K, {"question", "answer"}, as a conversation of one turn."""
    turn = {"role": "user", "content": f"{row['question']}\n{INSTRUCTION}"}
    return {"prompt": [turn], "answer": row["answer"]}


def main() -> None:
    import datasets

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k"), help="directory (%(default)s)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in datasets.load_dataset("openai/gsm8k", "main").items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps(as_prompt(row)) + "\n" for row in rows))


if __name__ == "__main__":
    main()
