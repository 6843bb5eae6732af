"""TRL's own GRPO trainer with the ops inside: two lines more than without, and a report of what ran.

pip install 'trl==1.12.0' requests
python examples/patched_trl.py
"""

import tempfile

import datasets
from trl import GRPOConfig, GRPOTrainer

from ppo_fast.integrations import patch_trl
from ppo_fast.rlhf.models import tiny

COLORS = ["red", "green", "blue", "yellow", "black", "white"]


def reward(completions: list[str], **_: object) -> list[float]:
    """The share of words that are "blue"."""
    return [text.split().count("blue") / max(1, len(text.split())) for text in completions]


tokenizer = tiny.make_tokenizer(COLORS)
model = tiny.make_model(len(tokenizer), hidden=32, layers=1)
prompts = datasets.Dataset.from_list([{"prompt": color} for color in COLORS])

with tempfile.TemporaryDirectory() as folder, patch_trl() as report:
    args = GRPOConfig(
        output_dir=folder,
        max_steps=20,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=8,
        learning_rate=5e-3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=5,
    )
    GRPOTrainer(model, reward, args, prompts, processing_class=tokenizer).train()
    print(report)
