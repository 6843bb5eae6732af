"""Scored samples as preference pairs."""

import json

import pytest
import torch

from ppo_fast import cli
from ppo_fast.rlhf import RewardModelConfig, UserError, load_config, train_ppo, train_reward_model
from ppo_fast.rlhf.config.ppo import ModelConfig
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo.reward_sources import ModelSource
from ppo_fast.rlhf.reports.export import export_pairs
from tests.rlhf.conftest import PROMPTS


def write(path, *records):
    names = ("update", "prompt", "completion", "score")
    path.mkdir(exist_ok=True)
    lines = [json.dumps(dict(zip(names, record, strict=True)), ensure_ascii=False) + "\n" for record in records]
    (path / "samples.jsonl").write_text("".join(lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_the_best_and_the_worst_response_to_a_prompt_make_a_pair(tmp_path):
    run = write(
        tmp_path / "run",
        (1, "p", "middle", 1.0),
        (1, "p", "good\u2028one", 2.0),
        (1, "q", "alone", 5.0),
        (1, "p", "bad", -1.0),
        (2, "p", "later", 0.0),
        (2, "r", "equal", 3.0),
        (2, "r", "same", 3.0),
        (2, "p", "latest", 0.5),
    )
    assert read(export_pairs(run)) == [
        {"prompt": "p", "chosen": "good\u2028one", "rejected": "bad", "score_chosen": 2.0, "score_rejected": -1.0},
        {"prompt": "p", "chosen": "latest", "rejected": "later", "score_chosen": 0.5, "score_rejected": 0.0},
    ]


def test_the_scores_are_those_before_penalties_and_no_answer_is_empty(tmp_path):
    """The longest response pays for its missing EOS; the empty one would be the worst of all."""
    run, texts = tmp_path / "run", {"long": (2.0, -1.0), "short": (1.0, 1.0), " \n": (-5.0, -5.0)}
    run.mkdir()
    records = [
        {"update": 1, "prompt": "p", "completion": text, "reward": 0.0, "unpenalized": own, "score": score}
        for text, (own, score) in texts.items()
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert read(export_pairs(run)) == [
        {"prompt": "p", "chosen": "long", "rejected": "short", "score_chosen": 2.0, "score_rejected": 1.0}
    ]


def test_messages_get_messages(tmp_path):
    prompt = [{"role": "user", "content": "hi"}]
    run = write(tmp_path / "run", (1, prompt, "yes", 1.0), (1, prompt, "no", 0.0))
    (pair,) = read(export_pairs(run, tmp_path / "new" / "out.jsonl"))
    assert pair["prompt"] == prompt
    assert pair["chosen"] == [{"role": "assistant", "content": "yes"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "no"}]


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^export: expected a run with samples\.jsonl, got '.*none'$"):
        export_pairs(tmp_path / "none")
    run = write(tmp_path / "run", (1, "p", "a", 1.0), (1, "q", "b", 2.0), (2, "p", "c", 3.0))
    with pytest.raises(UserError, match=r"^export: expected responses of different scores to one prompt in '.*', got"):
        export_pairs(run)
    assert not (run / "pairs.jsonl").exists()


def test_a_runs_samples_are_exported_and_train_a_reward_model_that_scores(make_config, tokenizer, tmp_path, capsys):
    log = {"all_samples": True, "samples_every": 0}
    config = make_config(updates=2, rollout={"samples_per_prompt": 4}, log=log, reward={"clip": None})
    train_ppo(
        config,
        reward_fn=lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids],
        prompts=PROMPTS,
        policy=tiny.make_model(64, hidden=32, layers=1, heads=2),
        tokenizer=tokenizer,
    )
    samples = read(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 2 * config.rollout.batch_size
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "pairs.jsonl")]) == 0
    assert capsys.readouterr().out.endswith(f"pairs: {tmp_path / 'pairs.jsonl'}\n")
    pairs = read(tmp_path / "pairs.jsonl")
    assert len(pairs) == 2 * 2
    for pair in pairs:
        assert pair["prompt"] in PROMPTS
        assert pair["score_chosen"] > pair["score_rejected"]
    flags = {
        "data.train": str(tmp_path / "pairs.jsonl"),
        "data.held_out_frac": "0.5",
        "optim.batch_size": "2",
        "output_dir": str(tmp_path / "reward"),
        "log.console": "False",
        "log.tensorboard": "False",
    }
    config = load_config(kind=RewardModelConfig, flags=flags)
    with pytest.warns(UserWarning, match="prompt and completion were tokenized apart"):  # here that is right
        reward = train_reward_model(
            config, model=tiny.make_model(64, hidden=32, layers=1, heads=2), tokenizer=tokenizer
        )
    source = ModelSource(str(reward.model), tokenizer, model=ModelConfig(), device=torch.device("cpu"), batch_size=4)
    stats = json.loads((reward.model / "reward_stats.json").read_text())
    assert source.saved_stats == (stats["mean"], stats["std"])
