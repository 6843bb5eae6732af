"""What a run needs is checked before a model is loaded; only first rows are read."""

import json
import sys

import pytest

from ppo_fast.rlhf import (
    DPOConfig,
    PPOConfig,
    RewardModelConfig,
    SFTConfig,
    ValueConfig,
    train_dpo,
    train_ppo,
    train_reward_model,
    train_sft,
    train_value_model,
)
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.errors import UserError, install_command
from ppo_fast.rlhf.preflight import check_ppo
from tests.helpers import raises_exactly

QUIET = {"console": False, "tensorboard": False}
USERS = """
def good(prompts, completions, completion_ids, level, topic=None): return [0.0 for _ in prompts]
def bare(prompts, completions): return [0.0 for _ in prompts]
def needy(completions, answer, **columns): return [0.0 for _ in completions]
def level(completions, level, **columns): return [0.0 for _ in completions]
def evaluate(generate, **_): return {}
def answer(prompts, sample): return []
class Callable:
    def __call__(self, completions, **columns): return [0.0 for _ in completions]
judge = Callable()
"""


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Prompts, functions, and no model at all: loading one would fail."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "w1", "level": 1}, {"prompt": "w2", "level": 2, "late": 3}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "u.py").write_text(USERS)
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "w1"}')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "runs").mkdir()
    return tmp_path


def config(changes):
    base = {
        "model": {"path": "org/model"},
        "data": {"prompts": "p.jsonl"},
        "reward": {"function": "u.py:good"},
        "evaluation": {},
        "log": QUIET,
    }
    return config_from_dict({k: base.get(k, {}) | changes.get(k, {}) for k in {**base, **changes}})


TAKES = "prompts, completions, completion_ids, level"
LOCAL = "no such directory {!r} in {{here}}"
MISTAKES = [
    ({"data": {"prompts": None}}, "data.prompts: expected a file of prompts, got null"),
    ({"data": {"prompts": "empty.jsonl"}}, "empty.jsonl: expected at least one row, got none"),
    ({"data": {"prompts": "q.jsonl"}}, "data.prompts: no such file 'q.jsonl' in {here}"),
    (
        {"data": {"columns": ["question=prompt"]}},
        "p.jsonl: expected the columns prompt, got level, question; data.columns renames them",
    ),
    ({"data": {"balance": "topic"}}, "data.balance: expected a column of the prompts (level), got 'topic'"),
    ({"data": {"order": "hard"}}, "data.order: expected a column of the prompts (level), got 'hard'"),
    ({"model": {"path": "runs/final"}}, f"model.path: {LOCAL.format('runs/final')}"),
    ({"model": {"path": "./base"}}, f"model.path: {LOCAL.format('./base')}"),
    ({"model": {"value_path": "~/base"}}, f"model.value_path: {LOCAL.format('~/base')}"),
    ({"reward": {"models": ["runs/reward"]}}, f"reward.models: {LOCAL.format('runs/reward')}"),
    ({"reward": {"function": "u.py:none"}}, "reward.function: no function 'none' in 'u.py'"),
    (
        {"reward": {"function": "u.py:bare"}},
        f"reward.function: expected a function that takes {TAKES} by keyword, "
        "got one without completion_ids, level: end its arguments with **columns",
    ),
    (
        {"reward": {"function": "u.py:needy"}},
        f"reward.function: expected a function of {TAKES}, got one that also needs 'answer'",
    ),
    ({"reward": {"weights": [1, 2]}}, "reward.weights: expected one for each of the 1 sources, got (1.0, 2.0)"),
    (
        {"reward": {"filter": "u.py:bare"}},
        f"reward.filter: expected a function that takes {TAKES} by keyword, "
        "got one without completion_ids, level: end its arguments with **columns",
    ),
    (
        {"rollout": {"function": "u.py:answer"}},
        "rollout.function: expected a function that takes prompts, prompt_ids, sample, tokenizer, level by keyword, "
        "got one without prompt_ids, tokenizer, level: end its arguments with **columns",
    ),
    ({"evaluation": {"every": 1}}, "evaluation.prompts: expected a file of prompts, got null"),
    (
        {"reward": {"function": "u.py:level"}, "evaluation": {"every": 1, "prompts": "held_out.jsonl"}},
        "evaluation.prompts: reward.function: expected a function of prompts, completions, completion_ids, "
        "got one that also needs 'level'",
    ),
    (
        {"evaluation": {"every": 1, "prompts": "p.jsonl", "best": "eval/score"}},
        "evaluation.best: expected one of eval/scores, eval/reward, eval/kl, eval/length, "
        "eval/truncated_frac, eval/win_rate, "
        "got 'eval/score'",
    ),
    (
        {"evaluation": {"every": 1, "prompts": "p.jsonl", "evaluators": ["u.py:needy"]}},
        "evaluation.evaluators: expected a function of generate, model, tokenizer, "
        "got one that also needs 'completions'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_a_mistake_stops_a_ppo_run_before_a_model_is_loaded(files, monkeypatch, changes, message):
    monkeypatch.setattr("ppo_fast.rlhf.ppo.train.load_models", lambda *_, **__: pytest.fail("a model was loaded"))
    with raises_exactly(message.replace("{here}", str(files)), UserError):
        train_ppo(config(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward": {"function": "u.py:judge"}},
        {"data": {"balance": "late", "order": "level"}},  # a column that the first row does not have
        {"reward": {"models": ["org/reward"], "weights": [1, 2]}},
        {"evaluation": {"every": 1, "prompts": "p.jsonl", "evaluators": ["u.py:evaluate"], "best": "eval/mine"}},
    ],
)
def test_inputs_that_fit_pass(changes):
    check_ppo(config(changes))


def test_objects_pass_and_an_iterator_is_not_consumed():
    rows = iter([{"prompt": "w1", "answer": 1}])
    check_ppo(config({"model": {"path": None}}), lambda completions, answer, **_: [], rows, given=True)
    assert next(rows) == {"prompt": "w1", "answer": 1}
    check_ppo(PPOConfig(log=QUIET), type, ["w1"], given=True)  # a builtin has no signature of use


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"updates": 1}, {}, "config: expected a PPOConfig, got {'updates': 1}"),
        (SFTConfig(), {}, "config: expected a PPOConfig, got a SFTConfig"),
        (
            PPOConfig(),
            {"policy": "org/model"},
            "policy: expected a model of transformers, got 'org/model'; "
            "model.path takes a directory or a name on the Hub",
        ),
        (PPOConfig(), {"policy": object()}, "policy: expected a model of transformers, got an object"),
        (
            PPOConfig(),
            {"tokenizer": "org/model"},
            "tokenizer: expected a tokenizer of transformers, got 'org/model'; "
            "model.path takes a directory or a name on the Hub",
        ),
        (
            PPOConfig(),
            {"reward_fn": "u.py:good"},
            "reward_fn: expected a function, got 'u.py:good'; reward.function takes its name",
        ),
        (PPOConfig(), {"rollout_fn": 3}, "rollout_fn: expected a function, got 3"),
    ],
)
def test_an_object_of_another_kind_is_refused(files, config, arguments, message):
    with raises_exactly(message, UserError):
        train_ppo(config, **arguments)
    assert [*(files / "runs").iterdir()] == []


@pytest.mark.parametrize(
    ("train", "kind", "forms"),
    [
        (train_sft, SFTConfig, "prompt and completion, or messages, or text"),
        (train_reward_model, RewardModelConfig, "chosen and rejected"),
        (train_dpo, DPOConfig, "chosen and rejected"),
        (train_value_model, ValueConfig, "prompt and completion and score, or prompt_ids and completion_ids and score"),
    ],
)
def test_a_mistake_stops_the_other_stages_before_a_model_is_loaded(files, monkeypatch, train, kind, forms):
    for name in ("load_policy", "load_scalar_model"):
        module = sys.modules[train.__module__]
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda *_: pytest.fail("a model was loaded"))

    def run(**changes):
        return train(config_from_dict({"model": {"path": "org/model"}, "log": QUIET} | changes, kind=kind))

    with raises_exactly(f"config: expected a {kind.__name__}, got a PPOConfig", UserError):
        train(PPOConfig())
    with raises_exactly("tokenizer: expected a tokenizer of transformers, got 3", UserError):
        train(kind(), tokenizer=3)
    with raises_exactly(f"data.train: no such file 'none.jsonl' in {files}", UserError):
        run(data={"train": "none.jsonl"})
    with raises_exactly(f"data.held_out: no such file 'none.jsonl' in {files}", UserError):
        run(data={"held_out": "none.jsonl"})
    message = f"p.jsonl: expected the columns {forms}, got prompt, level; data.columns renames them"
    with raises_exactly(message, UserError):
        run(data={"train": "p.jsonl"})
    with raises_exactly(f"model.path: no such directory 'runs/base' in {files}", UserError):
        run(model={"path": "runs/base"})


@pytest.mark.parametrize(
    ("changes", "module", "package"),
    [
        ({"log": {"tensorboard": True}}, "tensorboard", None),
        ({"log": QUIET | {"wandb": "project"}}, "wandb", "wandb"),
        ({"model": {"kernels": "liger"}}, "liger_kernel", "liger-kernel"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, changes, module, package):
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else "there")
    command = f"pip install {package}" if package else install_command()
    with raises_exactly(f"this command needs {module}, which is not installed: {command}", UserError):
        check_ppo(config(changes))
