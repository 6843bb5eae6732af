"""patch_trl: PPO and GRPO runs of TRL's own trainers, with its functions and with ours."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, set_seed

from ppo_fast.integrations import patch_trl
from ppo_fast.rlhf.models import tiny

LOGPROBS, ENTROPY = "trl.trainer.utils.selective_log_softmax", "trl.trainer.utils.entropy_from_logits"
TRAIN = "trl.experimental.ppo.ppo_trainer.PPOTrainer.train"
COMPARED = (
    "objective/kl",
    "objective/entropy",
    "objective/scores",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "policy/entropy_avg",
    "val/ratio",
    "val/num_eos_tokens",
)


def score_model(words: int, seed: int) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=words, pad_token_id=0, num_labels=1, **shape))


WORDS = [f"w{i}" for i in range(12)]


def ppo(folder: Path, **changes: Any) -> list[dict[str, float]]:
    """What a PPO run of a tiny model logs, update by update."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = tiny.make_tokenizer(WORDS)
    datasets = importlib.import_module("datasets")
    prompts = datasets.Dataset.from_list([{"input_ids": [4 + i, 4 + (i + 3) % 12]} for i in range(8)])
    args = PPOConfig(
        output_dir=str(folder),
        total_episodes=24,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=2,
        local_rollout_forward_batch_size=4,
        response_length=7,
        stop_token="eos",
        missing_eos_penalty=1.0,
        num_sample_generations=0,
        learning_rate=2e-2,
        gamma=0.95,
        cliprange=0.05,
        cliprange_value=0.05,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        **changes,
    )
    model = tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2)
    reference = tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2)
    trainer = PPOTrainer(
        args,
        tokenizer,
        model,
        reference,
        reward_model=score_model(len(tokenizer), 1),
        train_dataset=prompts,
        value_model=score_model(len(tokenizer), 2),
        eval_dataset=prompts,
    )
    set_seed(3)  # the order of minibatches comes from NumPy's generator, which the trainer leaves as it is
    trainer.train()
    return [line for line in trainer.state.log_history if "loss/policy_avg" in line]


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_a_run_logs_the_same_losses(tmp_path: Path, capsys: Any) -> None:
    theirs = ppo(tmp_path)
    with patch_trl() as report:
        ours = ppo(tmp_path)
    assert report.calls[TRAIN] == 1
    assert report.calls[LOGPROBS] == 3 * 2 * 2  # policy and reference, two batches
    assert not report.fallbacks
    assert len(ours) == len(theirs) == 3
    for ours_line, theirs_line in zip(ours, theirs, strict=True):
        for name in COMPARED:
            assert ours_line[name] == pytest.approx(theirs_line[name], rel=2e-4, abs=2e-6), name
    for name in ("policy/clipfrac_avg", "val/clipfrac_avg", "loss/policy_avg", "objective/kl"):
        assert any(line[name] != 0 for line in ours), name


def test_a_run_whose_options_the_ops_do_not_take_is_theirs_and_counted(tmp_path: Path, capsys: Any) -> None:
    theirs = ppo(tmp_path, lam=1.01)
    with patch_trl() as report:
        ours = ppo(tmp_path, lam=1.01)
    assert report.calls[TRAIN] == 0
    assert report.fallbacks == {(TRAIN, "cliprange_value 0, or gamma or lam outside [0, 1]"): 1}
    assert ours[0]["loss/policy_avg"] == pytest.approx(theirs[0]["loss/policy_avg"], rel=1e-4)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [completion.split().count("w3") + len(completion) / 50 for completion in completions]


def grpo(folder: Path) -> list[dict[str, float]]:
    """What a GRPO run of a tiny model logs, step by step."""
    tokenizer = tiny.make_tokenizer(WORDS)
    datasets = importlib.import_module("datasets")
    prompts = datasets.Dataset.from_list([{"prompt": f"w{i} w{(i + 3) % 12}"} for i in range(8)])
    from trl import GRPOConfig, GRPOTrainer

    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        num_generations=4,
        num_iterations=2,
        max_completion_length=6,
        beta=0.05,
        learning_rate=1e-2,
        temperature=0.9,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    path = str(folder / "model")  # the reference is loaded from there
    tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2).save_pretrained(path)
    trainer = GRPOTrainer(path, reward, args, prompts, processing_class=tokenizer)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_a_grpo_run_logs_the_same_losses(tmp_path: Path, capsys: Any) -> None:
    theirs_log = grpo(tmp_path)
    with patch_trl() as report:
        ours_log = grpo(tmp_path)
    assert report.calls[LOGPROBS] >= 4
    assert report.calls[ENTROPY] >= 4
    assert not report.fallbacks
    assert len(ours_log) == len(theirs_log) == 4
    for ours_line, theirs_line in zip(ours_log, theirs_log, strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl"):
            assert ours_line[name] == pytest.approx(theirs_line[name], rel=1e-4, abs=1e-6), name
    assert any(line["loss"] != 0 for line in ours_log)
    assert len({line["entropy"] for line in ours_log}) == 4
