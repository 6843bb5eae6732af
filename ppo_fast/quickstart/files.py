"""What the commands read: an untrained model, examples, prompts, the gold score, and a config per stage."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ppo_fast.quickstart import language
from ppo_fast.rlhf.models import tiny

SFT = """\
# ppo-fast sft --config {here}/sft.yaml
seed: {seed}
threads: 1
model: {{path: "{here}/base", device: cpu}}
data: {{train: "{here}/answers.jsonl", held_out_frac: 0.02}}
optim: {{lr: 3.0e-3, batch_size: 32, warmup_frac: 0.1}}
output_dir: "{here}/sft"
log: {{tensorboard: false, print_every: 100}}
"""
REWARD = """\
# ppo-fast reward --config {here}/reward.yaml
seed: {seed}
threads: 1
model: {{path: "{here}/sft/final", device: cpu}}
data: {{train: "{here}/pairs.jsonl", held_out_frac: 0.2}}
optim: {{lr: 1.0e-3, batch_size: 32, epochs: 3, warmup_frac: 0.1}}
output_dir: "{here}/reward"
log: {{tensorboard: false, print_every: 25}}
"""
PPO = """\
# ppo-fast train --config {here}/ppo.yaml
updates: {updates}
seed: {seed}
threads: 1
model: {{path: "{here}/sft/final", device: cpu}}
data: {{prompts: "{here}/prompts.jsonl", max_prompt_tokens: 8}}
reward: {{models: ["{here}/reward/final"]}}
rollout: {{batch_size: 128, max_new_tokens: {max_new_tokens}}}
kl: {{coef: 0.2}}
optim: {{lr: 4.0e-4, value_lr: 1.0e-3, warmup_frac: 0.1, epochs: 4, minibatch_size: 32}}
evaluation: {{every: 5, prompts: "{here}/test.jsonl", evaluators: ["{here}/gold.py:gold"], best: eval/gold}}
output_dir: "{here}/ppo"
log: {{tensorboard: false, print_every: 10, samples_every: 10, samples: 2}}
"""
TRAIN_PROMPTS, TEST_PROMPTS = 512, 128


def write_inputs(out: Path, seed: int, answers: int, updates: int) -> None:
    """Write the inputs of the stages, except the preferences, which come from the fine-tuned model's answers."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny.make_tokenizer(language.words())
    for part in (tiny.make_model(len(tokenizer), seed=seed), tokenizer):
        part.save_pretrained(out / "base")
    rng = random.Random(seed)
    test = language.sample_test_prompts(TEST_PROMPTS, rng)
    write_lines(out / "answers.jsonl", language.sample_answers(answers, rng, without=test))
    for name, prompts in (("prompts", language.sample_prompts(TRAIN_PROMPTS, rng, without=test)), ("test", test)):
        write_lines(out / f"{name}.jsonl", ({"prompt": prompt} for prompt in prompts))
    shutil.copyfile(language.__file__, out / "gold.py")
    here = json.dumps(str(out.resolve()))[1:-1]  # between double quotes YAML reads what JSON writes
    values = {"seed": seed, "updates": updates, "max_new_tokens": language.MAX_WORDS}
    for name, text in (("sft", SFT), ("reward", REWARD), ("ppo", PPO)):
        (out / f"{name}.yaml").write_text(text.format(here=here, **values), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON, one object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_prompts(path: Path) -> list[str]:
    """The prompts of such a file."""
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
