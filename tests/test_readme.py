"""What the README shows is what runs: its blocks are executed, its tables come from committed results."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from ppo_fast import cli
from ppo_fast.rlhf.config.names import field_defaults
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo.reward_hacking import RULES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DEBUGGING = (ROOT / "docs" / "debugging.md").read_text()


def _block(kind: str, name: str) -> str:
    match = re.search(rf"<!-- {kind}: {re.escape(name)} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert match is not None, f"README.md has no <!-- {kind}: {name} --> block"
    return match[1]


def test_the_example_of_the_ops_is_the_file_in_examples() -> None:
    name = "examples/ops_in_your_loop.py"
    assert _block("example", name) == (ROOT / name).read_text()


def test_tables_are_what_the_committed_results_say() -> None:
    command = [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"]
    assert subprocess.run(command, check=False).returncode == 0


def test_every_python_block_is_covered_by_a_marker() -> None:
    blocks = re.findall(r"(<!-- \w+: [^\n]* -->\n)?```(?:python|yaml|json)\n", README)
    assert blocks
    assert all(blocks)


def _write_files(directory: Path, *names: str) -> None:
    """Files of the README, and a tiny model of their words in `model`."""
    texts = [_block("file", name) for name in names]
    for name, text in zip(names, texts, strict=True):
        (directory / name).write_text(text)
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+[.,?]?", text)}
    tokenizer = tiny.make_tokenizer(sorted(words))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(directory / "model")
    tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2).save_pretrained(directory / "model")


def test_the_pipeline_runs_with_a_local_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write_files(tmp_path, "answers.jsonl", "pairs.jsonl", "prompts.jsonl", "reward.py")
    commands = [shlex.split(line)[1:] for line in _block("command", "pipeline").splitlines()]
    assert [command[0] for command in commands] == ["sft", "reward", "train", "dpo"]
    short = ["--updates", "1", "--rollout.batch-size", "16", "--rollout.max-new-tokens", "4"]
    for command in commands:
        local = ["model" if word == "Qwen/Qwen2.5-0.5B" else word for word in command]
        small = [*(short if command[0] == "train" else []), "--threads", "1", "--log.no-tensorboard"]
        assert cli.main([*local, *small]) == 0
    for name in ("sft", "reward", "ppo", "dpo"):
        assert (tmp_path / "runs" / name / "final" / "config.json").is_file()


def test_the_training_example_runs_with_a_local_model(tmp_path: Path) -> None:
    _write_files(tmp_path, "run.yaml", "reward.py", "prompts.jsonl")
    small = "--model.path model --updates 2 --rollout.batch-size 16 --rollout.max-new-tokens 6 --threads 1"
    command = [sys.executable, "-m", "ppo_fast.cli", "train", "--config", "run.yaml", *small.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = (tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert "objective/kl" in json.loads(lines[0])
    assert (tmp_path / "runs" / "first" / "final" / "config.json").is_file()


def test_the_example_of_callbacks_runs_with_a_local_model(tmp_path: Path) -> None:
    _write_files(tmp_path, "run.yaml", "reward.py", "prompts.jsonl", "lengths.py")
    settings = yaml.safe_load(_block("file", "run.yaml"))
    settings |= {"updates": 2, "threads": 1, "model": {"path": "model"}}
    settings["rollout"] |= {"batch_size": 16, "max_new_tokens": 6}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run = subprocess.run([sys.executable, "lengths.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.findall(r"^(\d+) \{'rollout': ", run.stdout, re.MULTILINE) == ["0", "1"]
    for line in (tmp_path / "runs" / "first" / "metrics.jsonl").read_text().splitlines():
        assert 1 <= json.loads(line)["length/min"] <= json.loads(line)["length/mean"]


def test_the_example_of_rewards_runs_with_local_models(tmp_path: Path) -> None:
    for name in ("ensemble.yaml", "scores.py"):
        (tmp_path / name).write_text(_block("file", name))
    tokenizer = tiny.make_tokenizer(["The", "capital", "of", "France", "is", "salt", "Paris"])
    model = tiny.make_model(len(tokenizer), hidden=16, layers=1, heads=2, max_positions=512, num_labels=1)
    for name in ("policy", "judge-model", "reward-a", "reward-b"):
        tokenizer.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name)
    for name in ("reward-a", "reward-b"):
        AutoModelForSequenceClassification.from_config(model.config).save_pretrained(tmp_path / name)
    rows = [{"prompt": f"The {topic}", "level": level, "topic": topic} for level, topic in enumerate(["salt", "Paris"])]
    for name in ("prompts.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = "--model policy --updates 1 --rollout.max-new-tokens 4 --rollout.batch-size 16 --threads 1 --out run"
    command = [sys.executable, "-m", "ppo_fast.cli", "train", "--config", "ensemble.yaml", *small.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert {"hacking/ensemble_std", "filter/masked", "eval/win_rate", "eval/capitals"} <= metrics.keys()
    assert (tmp_path / "run" / "best" / "config.json").is_file()
    groups = sorted({name.partition("/")[0] for name in metrics if "/" in name})
    named = re.findall(rf"`((?:{'|'.join(groups)})/\w+)`", README + DEBUGGING)
    assert len(named) > 30
    assert set(named) <= metrics.keys()


def test_the_knobs_are_fields_of_the_config_with_their_defaults() -> None:
    fields = field_defaults(PPOConfig)
    rows = re.findall(r"^\| (`[^|]*`) \((\S+)\) \|", README, re.MULTILINE)
    assert len(rows) == 10
    for names, default in rows:
        assert [fields[name] for name in re.findall(r"`(.*?)`", names)] == [float(default)] * (names.count("`") // 2)
    groups = sorted({name.partition(".")[0] for name in fields if "." in name})
    named = re.findall(rf"`((?:{'|'.join(groups)})\.\w+)", README + DEBUGGING)
    assert len(named) > 40
    assert set(named) - {"reward.py"} <= fields.keys()


def test_the_page_on_debugging_names_every_sign_of_reward_hacking() -> None:
    for sign in RULES:
        (row,) = re.findall(rf"^\| `{sign.metric}` .*", DEBUGGING, re.MULTILINE)[-1:]
        assert sign.limit == 0 or f" {sign.limit:g} " in row
        for field in re.findall(r"\w+\.\w+", sign.remedy):
            assert field in row


def test_the_figures_of_sampling_on_a_gpu_are_those_of_the_committed_result() -> None:
    cases = json.loads((ROOT / "benchmarks/results/NVIDIA-H200/rollout-7b.json").read_text())["cases"]
    page = (ROOT / "docs/benchmarks.md").read_text()
    for row, case in zip(("all weights", "adapters of rank 64"), cases.values(), strict=True):
        rate, times = f"{case['slots_tokens_per_s']:,.0f}", [case[f"{name}_s"] for name in ("slots", "prefill")]
        cells = [rate, *(f"{x:.2f} s" for x in times), f"{case['step_ms']:.2f} ms"]
        cells += [*(f"{case[f'{name}_s']:.2f} s" for name in ("capture", "first_token")), f"{case['peak_gib']:.1f} GiB"]
        assert f"| {row} | {' | '.join(cells)} |" in page
        assert f"{rate}" in README


def test_the_shares_of_the_profile_are_those_of_the_committed_result() -> None:
    times = json.loads((ROOT / "benchmarks/results/AMD-EPYC-AVX512/profile.json").read_text())["milliseconds"]
    text = " ".join(README.split())
    for group, milliseconds in times.items():
        assert f"{group} {round(100 * milliseconds / sum(times.values()))} %" in text
