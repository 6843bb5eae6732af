"""PPO with a tool: the policy learns to ask a calculator, and to say what it answered.

A prompt is a sum such as ``3 + 4 =``. The first turn is one word: a guess, or ``calc``, which asks the calculator. Its
answer enters the response as tokens that the policy did not choose: the mask is False there, and no loss counts them.
The second turn is the policy's answer.

    python examples/calculator.py
"""

from __future__ import annotations

import itertools
import tempfile
from typing import Any

from ppo_fast.rlhf import PPOConfig, PPOResult, train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models import tiny

LARGEST = 4
WORDS = [*map(str, range(2 * LARGEST + 1)), "+", "=", "calc"]
SUMS = [f"{a} + {b} =" for a, b in itertools.product(range(LARGEST + 1), repeat=2)]


def add(prompt: str) -> str:
    """The tool."""
    a, _, b, _ = prompt.split()
    return str(int(a) + int(b))


def calculator(prompts: list[str], prompt_ids: list[list[int]], sample: Any, tokenizer: Any, **_: Any) -> list[Any]:
    """Two turns: token ids, a mask (True: the policy chose it) and log-probabilities of each response."""
    ask = tokenizer.convert_tokens_to_ids("calc")
    first = sample(prompt_ids, max_new_tokens=1)
    asked = [row for row, (ids, _) in enumerate(first) if ids == [ask]]
    results = {row: tokenizer.encode(add(prompts[row]), add_special_tokens=False) for row in asked}
    second = sample([prompt_ids[row] + first[row][0] + results[row] for row in asked], max_new_tokens=1)
    responses = [(ids, [True], logprobs) for ids, logprobs in first]
    for row, (ids, logprobs) in zip(asked, second, strict=True):
        result = results[row]
        responses[row] = (
            [ask, *result, *ids],
            [True, *[False] * len(result), *[True] * len(ids)],
            [*first[row][1], *[0.0] * len(result), *logprobs],
        )
    return responses


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 for the right sum as the last word."""
    return [float(text.split()[-1:] == [add(prompt)]) for prompt, text in zip(prompts, completions, strict=True)]


def settings(output_dir: str, **changes: Any) -> PPOConfig:
    return config_from_dict(
        {
            "updates": 30,
            "threads": 1,
            "output_dir": output_dir,
            "rollout": {"batch_size": 64, "max_new_tokens": 3},
            "reward": {"missing_eos_penalty": 0.0},
            "kl": {"coef": 0.0},
            "optim": {"lr": 6e-3, "value_lr": 6e-3, "minibatch_size": 32, "epochs": 2},
            "log": {"tensorboard": False, "console": False},
        }
        | changes
    )


def train(config: PPOConfig) -> PPOResult:
    model = tiny.make_model(4 + len(WORDS), hidden=32, layers=1, heads=2)
    return train_ppo(
        config,
        policy=model,
        tokenizer=tiny.make_tokenizer(WORDS),
        prompts=SUMS,
        reward_fn=reward,
        rollout_fn=calculator,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        history = train(settings(directory)).history
    for update, metrics in enumerate(history, 1):
        if update % 5 == 0 or update == 1:
            print(f"update {update:3}  right {metrics['objective/scores']:.2f}  turns {metrics['length/mean']:.2f}")
