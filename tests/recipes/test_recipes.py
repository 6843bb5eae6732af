"""Each recipe runs, at the size of a tiny model; it says nothing that its preset says already."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForSequenceClassification

from benchmarks import bench_7b
from ppo_fast import cli
from ppo_fast.rlhf.config.files import PRESETS, load_config
from ppo_fast.rlhf.config.names import leaves
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.planning.plan import make_plan
from recipes import gsm8k
from recipes.smollm2 import prepare, reward

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMOLLM2 = ROOT / "recipes" / "smollm2"
PAGE = ROOT / "docs" / "recipes.md"
SMALL = [
    "--updates",
    "1",
    "--threads",
    "1",
    "--rollout.max-new-tokens",
    "4",
    "--log.no-tensorboard",
    "--log.no-console",
]
HALF_BILLION = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
SHAPES = {"0.5B": HALF_BILLION, "7B": bench_7b.QWEN | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts, a tiny policy and a reward model, under the names that the recipes have for theirs."""
    monkeypatch.chdir(tmp_path)
    rows = [gsm8k.as_prompt({"question": f"{n} + 1 ?", "answer": f"#### {n + 1}"}) for n in range(20)]
    tokenizer = tiny.make_tokenizer([str(n) for n in range(30)] + [*"+?{}:", "answer"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    policy = tiny.make_model(len(tokenizer), hidden=32, layers=1, heads=2, max_positions=256)
    policy.save_pretrained("model")
    shape = policy.config
    shape.num_labels = 1
    AutoModelForSequenceClassification.from_config(shape).save_pretrained("runs/reward/final")
    for directory in ("model", "runs/reward/final"):
        tokenizer.save_pretrained(directory)
    for name in ("prompts.jsonl", "runs/gsm8k/train.jsonl", "runs/gsm8k/test.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def _last_metrics(run: str) -> dict[str, float]:
    return json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.filterwarnings("ignore:a bfloat16 weight", "ignore:reward.models")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_a_tiny_model(files: Path, recipe: Path) -> None:
    warmup = ["--optim.critic-warmup-updates", "0"]  # fewer than one update
    sizes = ["--rollout.batch-size", "8", "--optim.minibatch-size", "4"]
    assert cli.main(["train", "--config", str(recipe), "--model", "model", *SMALL, *warmup, *sizes]) == 0
    asked, ran = load_config(recipe), yaml.safe_load(Path(load_config(recipe).output_dir, "config.yaml").read_text())
    changed = {"updates", "threads", "path", "max_new_tokens", "tensorboard", "console", "batch_size"}
    changed |= {"minibatch_size", "critic_warmup_updates"}
    fields = dict(leaves(json.loads(json.dumps(dataclasses.asdict(asked)))))
    different = {name for name, value in leaves(ran) if fields[name] != value}
    assert {name.rpartition(".")[2] for name in different} <= changed
    assert "objective/scores" in _last_metrics(asked.output_dir)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_repeats_no_value_of_its_preset_or_of_the_defaults(recipe: Path) -> None:
    own = yaml.safe_load(recipe.read_text())
    preset = own.pop("preset")
    said = dict(leaves(yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())))
    below = dict(leaves(dataclasses.asdict(load_config(preset=preset))))
    for name, value in leaves(own):
        assert below[name] != value, f"{recipe.name}: {name}"
        assert name not in said, f"{recipe.name}: {name}"


def test_the_sums_in_json_are_learned_from_by_the_same_config(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["prepare.py", "--prompts-only", "--out", "sums"])
    prepare.main()
    lines = (Path("sums", f"{name}.jsonl").read_text().splitlines() for name in ("prompts", "held_out"))
    rows = [json.loads(line) for line in itertools.chain(*lines)]
    assert len(rows) == 81
    assert len({row["prompt"][1]["content"] for row in rows}) == 81  # none is in both
    assert all(eval(row["prompt"][1]["content"]) == row["answer"] for row in rows)
    command = ["train", "--config", str(SMOLLM2 / "run.yaml"), "--model", "model", "--prompts", "sums/prompts.jsonl"]
    command += ["--evaluation.prompts", "sums/held_out.jsonl", "--reward", f"{SMOLLM2 / 'reward.py'}:reward"]
    assert cli.main([*command, *SMALL, "--out", "run", "--rollout.batch-size", "8"]) == 0
    assert {"eval/scores", "group/agree"} <= _last_metrics("run").keys()


def test_the_reward_is_for_json_and_for_the_sum() -> None:
    texts = ['{"answer": 5}', '{"answer": 6}', '{"answer": "5"}', "5", '{"answer": 5, "why": 1}', ' {"answer":5}\n']
    assert reward.reward(texts, answer=[5] * 6) == [2, 1, 0, 0, 0, 2]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_planned_peaks_on_the_page_are_those_of_the_recipes(recipe: Path, tmp_path: Path) -> None:
    """A reward model is an adapter on the base where the recipe trains adapters, else a whole model of that size."""
    config = load_config(recipe)
    (shape,) = (shape for size, shape in SHAPES.items() if f"-{size}-" in str(config.model.path))
    _write(tmp_path / "model", "config.json", shape)
    if config.model.lora.rank:
        lora = {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS",
            "r": config.model.lora.rank,
            "target_modules": "all-linear",
        }
        lora |= {"base_model_name_or_path": str(tmp_path / "model"), "modules_to_save": ["score"]}
        _write(tmp_path / "reward", "adapter_config.json", lora)
    else:
        classifier = {"architectures": ["Qwen2ForSequenceClassification"], "num_labels": 1}
        _write(tmp_path / "reward", "config.json", shape | classifier)
    local = {
        "model.path": str(tmp_path / "model"),
        "reward.models": [str(tmp_path / "reward")] * len(config.reward.models),
    }
    plan = make_plan(load_config(recipe, flags=local), "cuda")
    (row,) = re.findall(rf"^\| `{recipe.name}` .*", PAGE.read_text(), re.MULTILINE)
    assert f"| {plan.peak / 2**30:.1f} GiB |" in row


def _write(directory: Path, name: str, values: dict[str, object]) -> None:
    directory.mkdir()
    (directory / name).write_text(json.dumps(values))


def test_the_page_names_every_recipe() -> None:
    assert re.findall(r"^\| `(\S+\.yaml)` ", PAGE.read_text(), re.MULTILINE) == [path.name for path in RECIPES]


def test_the_figures_of_the_sums_are_those_of_the_committed_run() -> None:
    result = json.loads((SMOLLM2 / "result.json").read_text())
    run, page = yaml.safe_load((SMOLLM2 / "run.yaml").read_text()), PAGE.read_text()
    assert len(result["updates"]) == run["updates"]
    before, after = (result["held_out"][when] for when in ("before", "after"))
    for row, name in (("JSON with one integer", "json"), ("the right integer in it", "right")):
        assert f"| {row} | {before[name]:.0%} | {after[name]:.0%} |".replace("%", " %") in page
    assert f"took {result['minutes']:.0f} minutes" in page
    columns = {row["sum"]: (row["before"], row["after"]) for row in result["samples"]}
    sums = re.findall(r"^\| (\d \+ \d) \| `(.*)` \| `(.*)` \|$", page, re.MULTILINE)
    assert len(sums) == 6
    for name, *texts in sums:
        assert [text.replace("\n", " ") for text in columns[name]] == texts
