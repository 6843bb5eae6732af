"""Config: one source for file and flags; mistakes are one sentence."""

import copy
import dataclasses
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ppo_fast import PolicyLossConfig, rlhf
from ppo_fast.rlhf import errors
from ppo_fast.rlhf.arguments import parse
from ppo_fast.rlhf.config.files import (
    PRESETS,
    config_from_dict,
    first_difference,
    load_config,
    save_config,
)
from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.config.names import field_defaults
from ppo_fast.rlhf.config.ppo import (
    AdvantageConfig,
    KLConfig,
    LossConfig,
    OptimConfig,
    PPOConfig,
    check_ranks,
)
from ppo_fast.rlhf.config.renamed import RENAMED
from ppo_fast.rlhf.config.supervised import DPOConfig, RewardModelConfig, SFTConfig, ValueConfig
from ppo_fast.rlhf.config.synonyms import OTHERS
from ppo_fast.rlhf.errors import UserError, require
from tests.helpers import raises_exactly

KINDS = (PPOConfig, SFTConfig, RewardModelConfig, ValueConfig, DPOConfig)
GROUPS = dict.fromkeys(
    type(f.default_factory()) for kind in KINDS for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING
)


def test_defaults_are_the_published_ones():
    config = PPOConfig()
    assert (config.optim.lr, config.optim.value_lr, config.optim.betas, config.optim.eps) == (
        1e-6,
        5e-6,
        (0.9, 0.95),
        1e-5,
    )
    assert (config.loss.clip_low, config.loss.clip_high, config.loss.value_clip, config.loss.vf_coef) == (
        0.2,
        0.2,
        0.2,
        0.5,
    )
    assert (config.advantage.gamma, config.advantage.lam) == (1.0, 0.95)
    assert (config.kl.coef, config.kl.placement, config.kl.adaptive) == (0.05, "reward", False)
    assert (config.kl.target, config.kl.horizon) == (6.0, 10_000)
    assert (config.reward.clip, config.reward.missing_eos_penalty) == (10.0, 1.0)
    assert (config.optim.epochs, config.optim.max_grad_norm, config.optim.warmup_frac) == (4, 1.0, 0.03)


@pytest.mark.parametrize("group", GROUPS)
def test_every_field_has_a_line_of_help(group):
    source = "".join(inspect.getsource(base) for base in group.__mro__[:-1])
    for name in (f.name for f in dataclasses.fields(group)):
        assert re.search(rf"^    {name}: [^#\n]+  # \S", source, re.MULTILINE), name


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "updates: 7\noptim:\n  lr: 1e-5\n  betas: [0.8, 0.9]\n"),
        ("a.toml", "updates = 7\n[optim]\nlr = 1e-5\nbetas = [0.8, 0.9]\n"),
    ],
)
def test_a_file_over_the_defaults(tmp_path: Path, name, text):
    path = tmp_path / name
    path.write_text(text)
    config = load_config(path)
    # YAML 1.1 reads 1e-5 as a string; it must arrive as a number.
    assert (config.updates, config.optim.lr, config.optim.betas) == (7, 1e-5, (0.8, 0.9))
    assert config.optim.eps == PPOConfig().optim.eps


def test_a_flag_of_a_group_in_a_group():
    config = load_config(preset="7b-80g-lora", flags={"model.lora.rank": "8", "optim.lr": "1e-4"})
    assert (config.model.lora.rank, config.model.lora.alpha, config.optim.lr) == (8, 128.0, 1e-4)


@pytest.mark.parametrize("path", sorted(PRESETS.glob("7b-*.yaml")), ids=lambda path: path.stem)
def test_a_preset_says_only_what_is_no_default(path):
    chosen, defaults = flat(dataclasses.asdict(load_config(preset=path.stem))), flat(dataclasses.asdict(PPOConfig()))
    differing = {name for name, value in chosen.items() if value != defaults[name]}
    assert differing == flat(yaml.safe_load(path.read_text())).keys()


def flat(tree, prefix=""):
    """Values by dotted name."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_a_file_may_name_the_preset_that_it_extends(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("preset: tiny-cpu\noptim: {epochs: 2}\n")
    config = load_config(path, flags={"rollout.max_new_tokens": "8"})
    assert (config.threads, config.optim.lr, config.optim.epochs) == (1, 1e-3, 2)
    assert (config.rollout.batch_size, config.rollout.max_new_tokens) == (64, 8)
    message = f"preset: expected none with {str(path)!r}, which extends 'tiny-cpu', got '7b-24g'"
    with raises_exactly(message, UserError):
        load_config(path, preset="7b-24g")
    path.write_text("preset: 3\n")
    with pytest.raises(UserError, match=r"^preset: expected one of .*, tiny-cpu, got 3$"):
        load_config(path)


def test_a_file_over_a_preset(tmp_path: Path):
    path = tmp_path / "a.yaml"
    path.write_text("optim: {lr: 0.5}")
    config = load_config(path, preset="tiny-cpu")
    assert (config.optim.lr, config.optim.value_lr, config.threads) == (0.5, 1e-3, 1)


def test_the_resolved_config_reads_back_equal(tmp_path: Path):
    config = dataclasses.replace(PPOConfig(), updates=3, loss=LossConfig(clip_high=None, dual_clip=3.0))
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optim": {"max_gradnorm": 1}},
            "config: unknown key 'optim.max_gradnorm', the nearest is 'optim.max_grad_norm'",
        ),
        ({"optim": {"epoch": 1}}, "config: unknown key 'optim.epoch', the nearest is 'optim.epochs'"),
        ({"gamma": 1}, "config: unknown key 'gamma', the nearest is 'advantage.gamma'"),
        ({"rolout": {"batch_size": 8}}, "config: unknown key 'rolout.batch_size', the nearest is 'rollout.batch_size'"),
        ({"updates": "many"}, "config: updates: expected an int, got 'many'"),
        (
            {"kl": {"placement": "both sides"}},
            "config: kl.placement: expected 'reward', 'loss' or 'both', got 'both sides'",
        ),
        ({"optim": 3}, "config: optim: expected an OptimConfig or a mapping such as {'name': ...}, got 3"),
    ],
)
def test_mistakes_in_a_file_name_the_key(values, message):
    with pytest.raises(UserError) as error:
        config_from_dict(values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_rule_18_batch_sizes_that_do_not_divide_name_the_numbers():
    cases = {
        "optim.minibatch_size: expected a divisor of rollout.batch_size = 64, got 24": {
            "optim": {"minibatch_size": 24}
        },
        "optim.micro_batch_size: expected a divisor of optim.minibatch_size = 16, got 5": {
            "optim": {"micro_batch_size": 5}
        },
        "optim.tokens_per_pass: expected null with optim.micro_batch_size, got 4096": {
            "optim": {"micro_batch_size": 4, "tokens_per_pass": 4096}
        },
        "rollout.tokens_per_pass: expected null with rollout.micro_batch_size, got 4096": {
            "rollout": {"micro_batch_size": 4, "tokens_per_pass": 4096}
        },
        "optim.tokens_per_pass: expected a number > 0, got 0": {"optim": {"tokens_per_pass": 0}},
        "rollout.samples_per_prompt: expected a divisor of rollout.batch_size = 64, got 3": {
            "rollout": {"samples_per_prompt": 3}
        },
    }
    for message, values in cases.items():
        with pytest.raises(UserError) as error:
            config_from_dict(values)
        assert str(error.value) == f"config: {message}"


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_rule_07_only_k1_is_a_reward(estimator):
    with raises_exactly("config: 'kl.reward_estimator' is gone: the KL in the reward is always k1", UserError):
        config_from_dict({"kl": {"reward_estimator": estimator}})


def old_values(old):
    """Nested values with the old key, and what they hold."""
    name, _, value = old.partition(": ")
    group, _, last = name.partition(".")
    return {group: {last: value or 7}}


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_or_value_names_the_new_one(old, new, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(old_values(old)))
    message = f"{old!r} is now {new!r}"
    with raises_exactly(f"{tmp_path / 'run.yaml'}: {message}", UserError):
        load_config(tmp_path / "run.yaml")
    name, _, value = old.partition(": ")
    with raises_exactly(f"flags: {message}", UserError):
        parse("train", [f"--{name.replace('_', '-')}", value or "7"])
    with raises_exactly(f"resume: {message}", UserError):
        parse("train", ["--resume", f"--{name.replace('_', '-')}", value or "7"])
    with raises_exactly(f"resume: {message}", UserError):  # of a checkpoint
        config_from_dict(old_values(old), source="resume")


@pytest.mark.parametrize("new", RENAMED.values())
def test_the_new_key_is_there_and_takes_the_new_value(new):
    name, _, value = new.partition(": ")
    assert name in field_defaults(PPOConfig)
    if value:
        flags = {name: value, "model.lora.rank": "4", "model.layout": "adapters"}
        assert str(flat(dataclasses.asdict(load_config(flags=flags)))[name]).lower() == value


def test_a_group_given_in_part_keeps_the_defaults_of_its_config():
    assert config_from_dict({"optim": {"epochs": 2}}, kind=DPOConfig).optim.lr == DPOConfig().optim.lr == 1e-6


def test_rule_07_k1_is_no_loss():
    with pytest.raises(UserError, match=r"kl\.loss_estimator: expected 'k2', 'full' or 'k3' .* got 'k1'"):
        config_from_dict({"kl": {"loss_estimator": "k1"}})
    for estimator in ("k2", "k3", "full"):
        assert config_from_dict({"kl": {"loss_estimator": estimator}}).kl.loss_estimator == estimator


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout": {"temperature": 0}}, "rollout.temperature: expected 1e-9 <= temperature <= 1e9, got 0.0"),
        ({"rollout": {"stop": [""]}}, "rollout.stop: expected strings that are not empty, got ('',)"),
        (
            {"rollout": {"correction_cap": 0.5}},
            "rollout.correction_cap: expected a number >= 1, got 0.5",
        ),
        (
            {"rollout": {"correction_band": [1.1, 2.0]}},
            "rollout.correction_band: expected two numbers, 0 <= low <= 1 <= high, got (1.1, 2.0)",
        ),
        ({"rollout": {"top_p": 1.5}}, "rollout.top_p: expected 0 < top_p <= 1 or null, got 1.5"),
        ({"rollout": {"top_k": 0}}, "rollout.top_k: expected an int >= 1 or null, got 0"),
        ({"advantage": {"lam": 2}}, "advantage.lam: expected 0 <= lam <= 1 or 'adaptive', got 2.0"),
        ({"advantage": {"lam_alpha": 0}}, "advantage.lam_alpha: expected a number > 0, got 0.0"),
        ({"advantage": {"value_lam": 2}}, "advantage.value_lam: expected 0 <= value_lam <= 1 or null, got 2.0"),
        (
            {"updates": 3, "optim": {"critic_warmup_updates": 3}},
            "optim.critic_warmup_updates: expected fewer than updates = 3, got 3",
        ),
        ({"kl": {"coef": -1}}, "kl.coef: expected a number >= 0, got -1.0"),
        ({"kl": {"coef": 0, "adaptive": True}}, "kl.coef: expected a number > 0 when kl.adaptive, got 0.0"),
        ({"optim": {"lr": 0}}, "optim.lr: expected a number > 0, got 0.0"),
        ({"optim": {"warmup_frac": 1.5}}, "optim.warmup_frac: expected 0 <= warmup_frac <= 1, got 1.5"),
        ({"loss": {"penalty_target": 0.01}}, "loss.penalty_coef: expected a number > 0, got 0.0"),
        ({"seed": -1}, "seed: expected a number >= 0, got -1"),
        ({"updates": 0}, "updates: expected a number > 0, got 0"),
        ({"kl": {"coef": float("inf")}}, "kl.coef: expected a number >= 0, got inf"),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas: expected two numbers 0 <= beta < 1, got (0.9, 1.0)"),
        ({"optim": {"weight_decay": -0.1}}, "optim.weight_decay: expected a number >= 0, got -0.1"),
        ({"reward": {"missing_eos_penalty": -1}}, "reward.missing_eos_penalty: expected a number >= 0, got -1.0"),
        ({"reward": {"length_penalty": -1}}, "reward.length_penalty: expected a number >= 0, got -1.0"),
        ({"reward": {"overlong_penalty": -1}}, "reward.overlong_penalty: expected a number >= 0, got -1.0"),
        ({"reward": {"overlong_buffer": 0}}, "reward.overlong_buffer: expected a number > 0, got 0"),
        (
            {"reward": {"overlong_buffer": 65}},
            "reward.overlong_buffer: expected at most rollout.max_new_tokens = 64, got 65",
        ),
        ({"rollout": {"dynamic_sampling": -1}}, "rollout.dynamic_sampling: expected a number >= 0, got -1"),
        ({"reward": {"std_coef": -1}}, "reward.std_coef: expected a number >= 0, got -1.0"),
        ({"reward": {"weights": [1, -1]}}, "reward.weights: expected a number >= 0, got -1.0"),
        ({"reward": {"weights": [0, 0]}}, "reward.weights: expected one above 0, got (0.0, 0.0)"),
        (
            {"reward": {"rejected_score": float("nan")}},
            "reward.rejected_score: expected a finite number, got nan",
        ),
        ({"reference": {"every": 0}}, "reference.every: expected a number > 0, got 0"),
        ({"reference": {"decay": 1}}, "reference.decay: expected 0 <= decay < 1, got 1.0"),
        ({"evaluation": {"patience": -1}}, "evaluation.patience: expected a number >= 0, got -1"),
        ({"evaluation": {"patience": 1}}, "evaluation.patience: expected 0 without evaluation.every and best, got 1"),
        ({"optim": {"warmup_steps": -1}}, "optim.warmup_steps: expected a number >= 0, got -1"),
        ({"max_hours": 0}, "max_hours: expected a number > 0, got 0.0"),
        ({"evaluation": {"every": -1}}, "evaluation.every: expected a number >= 0, got -1"),
        ({"data": {"max_prompt_tokens": 0}}, "data.max_prompt_tokens: expected a number > 0, got 0"),
        ({"checkpoint": {"every": -1}}, "checkpoint.every: expected a number >= 0, got -1"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(UserError) as error:
        config_from_dict(values)
    assert str(error.value) == f"config: {message}"


PYTHON = [
    (PPOConfig, {"updates": 2.5}, "updates: expected an int, got 2.5"),
    (PPOConfig, {"model": "llama"}, "model: expected a ModelConfig or a mapping such as {'path': ...}, got 'llama'"),
    (PPOConfig, {"log": None}, "log: expected a LogConfig or a mapping such as {'tensorboard': ...}, got None"),
    (PPOConfig, {"model": WeightsConfig()}, "model: expected a ModelConfig .*, got a WeightsConfig"),
    (PPOConfig, {"optim": {"lrr": 1}}, "unknown key 'optim.lrr', the nearest is 'optim.lr'"),
    (PPOConfig, {"optim": {"betas": [1, 2, 3]}}, "optim.betas: expected a list of 2 numbers, got .*"),
    (PPOConfig, {"reward": {"models": "one"}}, "reward.models: expected a list of texts, got 'one'"),
    (PPOConfig, {"reward": {"weights": [1, "a"]}}, "reward.weights: expected a list of numbers, got [1, 'a']"),
    (PPOConfig, {"updates": True}, "updates: expected an int, got True"),
    (KLConfig, {"coef": False}, "kl.coef: expected a number, got False"),
    (PPOConfig, {"output_dir": ""}, "output_dir: expected the name of a directory, got ''"),
    (PPOConfig, {"log": {"console": "maybe"}}, "log.console: expected true or false, got 'maybe'"),
    (
        PPOConfig,
        {"reward": {"function": len}},
        "reward.function: expected text or null, got a builtin_function_or_method; "
        "pass an object as the argument reward_fn",
    ),
    (SFTConfig, {"optim": {"epochs": "two"}}, "optim.epochs: expected an int, got 'two'"),
    (RewardModelConfig, {"init": 3}, "init: expected text or null, got 3"),
    (ValueConfig, {"gamma": "one"}, "gamma: expected a number, got 'one'"),
    (DPOConfig, {"beta": None}, "beta: expected a number, got None"),
    (DPOConfig, {"model": {"lora": {"rank": None}}}, "model.lora.rank: expected an int, got None"),
    (KLConfig, {"placement": "rewards"}, "kl.placement: expected 'reward', 'loss' or 'both', got 'rewards'"),
    (AdvantageConfig, {"lam": "any"}, "advantage.lam: expected a number or 'adaptive', got 'any'"),
    (OptimConfig, {"learning_rate": 1}, "unknown key 'optim.learning_rate'; here it is 'optim.lr'"),
]


@pytest.mark.parametrize(("kind", "values", "message"), PYTHON)
def test_a_config_made_in_python_is_refused_as_that_of_a_file(kind, values, message):
    with pytest.raises(UserError) as made:
        kind(**values)
    assert re.fullmatch(message if ".*" in message else re.escape(message), str(made.value))
    if kind in KINDS:
        with raises_exactly(f"config: {made.value}", UserError):
            config_from_dict(values, kind=kind)


def test_a_config_made_in_python_is_converted_as_that_of_a_file(tmp_path):
    values = {"optim": {"lr": "1e-5", "betas": [0.5, 1 / 2]}, "updates": 7.0, "model": {"lora": {"merge": "false"}}}
    config = PPOConfig(**values, output_dir=tmp_path, reward={"models": [tmp_path]})
    assert config == config_from_dict(values | {"output_dir": str(tmp_path), "reward": {"models": [str(tmp_path)]}})
    assert (config.optim.lr, config.optim.betas, config.updates) == (1e-5, (0.5, 0.5), 7)
    assert (config.output_dir, config.reward.models) == (str(tmp_path), (str(tmp_path),))
    assert DPOConfig(optim={"epochs": 2}).optim.lr == 1e-6  # the default of the config, not of the class
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    with raises_exactly("optim.lr: expected a number > 0, got 0.0", UserError):
        dataclasses.replace(config, optim={"lr": 0})


def test_every_config_class_is_exported():
    assert {kind.__name__ for kind in (*KINDS, *GROUPS)} <= {*rlhf.__all__}
    assert all(getattr(rlhf, kind.__name__) is kind for kind in (*KINDS, *GROUPS))


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [
        (PPOConfig, "learning_rate", "; here it is 'optim.lr'"),
        (PPOConfig, "cliprange", "; here it is 'loss.clip_low' or 'loss.clip_high'"),
        (PPOConfig, "max_length", "; here it is 'data.max_prompt_tokens' or 'rollout.max_new_tokens'"),
        (DPOConfig, "max_length", "; here it is 'data.max_tokens'"),
        (SFTConfig, "num_train_epochs", "; here it is 'optim.epochs'"),
        (PPOConfig, "num_train_epochs", "; here it is 'updates' or 'optim.epochs'"),
        (SFTConfig, "per_device_train_batch_size", "; here it is 'optim.micro_batch_size'"),
        (PPOConfig, "gamma", ", the nearest is 'advantage.gamma'"),
        (PPOConfig, "vf_coef", ", the nearest is 'loss.vf_coef'"),
        (PPOConfig, "kl_coef", "; here it is 'kl.coef'"),
        (SFTConfig, "dataset_name", "; here it is 'data.train'"),
        (PPOConfig, "lora", "; here it is 'model.lora.rank'"),
        (PPOConfig, "exp_name", "; here it is 'output_dir'"),
        (PPOConfig, "ppo_micro_batch_size_per_gpu", "; here it is 'optim.micro_batch_size'"),
        (PPOConfig, "model.lora.dropout", ""),
        (PPOConfig, "zero_stage", ""),
    ],
)
def test_a_name_of_other_trainers_is_a_hint_and_a_far_one_is_no_nearest(kind, name, meant):
    with raises_exactly(f"unknown key {name!r}{meant}", UserError):
        kind(**{name: 1})


def test_the_hints_name_settings_that_there_are():
    known = {name for kind in KINDS for name in field_defaults(kind)}
    assert {*OTHERS} <= known
    theirs = " ".join(OTHERS.values()).split()
    assert len(theirs) > 150
    assert not {*theirs} & {"lr", "epochs", "gamma"}  # ours; the nearest name finds them


def test_the_loss_config_is_checked_by_the_op_it_configures():
    with pytest.raises(UserError, match=r"loss: .*dual_clip"):
        config_from_dict({"loss": {"dual_clip": 0.5}})
    with raises_exactly(
        "config: loss: PolicyLossConfig: expected dual_clip to be None with objective='cispo', got 3.0", UserError
    ):
        config_from_dict({"loss": {"objective": "cispo", "dual_clip": 3.0}})


def test_the_loss_config_hands_its_options_to_the_op():
    options = {"objective": "cispo", "clip_low": None, "clip_high": 4.0, "ratio": "sequence", "ent_coef": 0.1}
    assert LossConfig(**options).policy_loss(kl_coef=0.5) == PolicyLossConfig(**options, kl_coef=0.5)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(UserError, match=r"config: no such file"):
        load_config(tmp_path / "none.yaml")
    presets = "0.5b-24g, 7b-24g, 7b-80g-full, 7b-80g-lora, tiny-cpu"
    with raises_exactly(f"preset: expected one of {presets}, got 'huge'", UserError):
        load_config(preset="huge")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UserError, match=r"expected a mapping of keys to values, got list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"broken\.yaml: while parsing"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"log: {dir: \xfc}")
    with pytest.raises(UserError, match=r"latin\.yaml: 'utf-8' codec can't decode"):
        load_config(tmp_path / "latin.yaml")


def test_a_missing_dependency_names_the_command_that_installs_it_here(monkeypatch, tmp_path):
    root = Path(errors.__file__).parents[2]
    start = "this command needs no_such_package, which is not installed: pip install"
    monkeypatch.chdir(tmp_path)
    with raises_exactly(f"{start} '{root}[train]'", UserError):
        require("no_such_package")
    monkeypatch.chdir(root)
    with raises_exactly(f"{start} '.[train]'", UserError):
        require("no_such_package")
    with raises_exactly(f"{start} other", UserError):
        require("no_such_package", "other")
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages/ppo_fast/rlhf/errors.py"))
    with raises_exactly(f"{start} 'ppo-fast[train]'", UserError):
        require("no_such_package")


def test_importing_the_trainer_needs_torch_only():
    heavy = ["transformers", "pydantic", "yaml", "tyro", "tensorboard", "matplotlib"]
    code = f"import sys, ppo_fast.rlhf; sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "[]"


def test_a_free_group_frees_no_field_whose_name_begins_alike():
    def config(value):
        group = dataclasses.make_dataclass("Log", ["dir"])(value)
        return dataclasses.make_dataclass("Config", ["log", "log_more"])(group, value)

    assert first_difference(config(1), config(2)) == ("log.dir", 1, 2)
    assert first_difference(config(1), config(2), ["log"]) == ("log_more", 1, 2)
    assert first_difference(config(1), config(2), ["log", "log_more"]) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rollout": {"engine": "vllm"}},
            "rollout.engine: expected 'slots', 'generate' or null under torchrun, got 'vllm'",
        ),
        (
            {"optim": {"in_backward": True}},
            "optim.in_backward: expected false under torchrun, where no rank has a whole gradient, got True",
        ),
        (
            {"model": {"gradient_checkpointing": True, "offload_activations": True}},
            "model.offload_activations: expected false under torchrun, which gathers weights in the backward pass, "
            "got True",
        ),
    ],
)
def test_what_several_processes_cannot_have_is_refused_by_name(values, message):
    with raises_exactly(message, UserError):
        check_ranks(config_from_dict(values))
