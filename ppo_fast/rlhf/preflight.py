"""Checks of a run's inputs that need no model: packages, paths, files, columns, and the user's functions.

They come before the first model is loaded, which takes minutes. Only the first row of each file is read here.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ppo_fast.rlhf.config.base import OBJECTS, shown
from ppo_fast.rlhf.config.model import WeightsConfig
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.rollout import DataConfig
from ppo_fast.rlhf.config.run import RunConfig, RunLogConfig
from ppo_fast.rlhf.config.supervised import ExamplesConfig, SupervisedConfig
from ppo_fast.rlhf.data.rows import RESERVED, read_rows, source_name
from ppo_fast.rlhf.errors import UserError, check, error_prefix, missing_package
from ppo_fast.rlhf.files import check_local
from ppo_fast.rlhf.user_code import load_callable
from ppo_fast.rlhf.world import by_all_ranks

Source = str | Path | Iterable[object]
METRICS = (
    "eval/scores",
    "eval/reward",
    "eval/kl",
    "eval/length",
    "eval/truncated_frac",
    "eval/win_rate",
)  # of every evaluation


def check_objects(
    config: RunConfig,
    kind: type[RunConfig],
    *,
    tokenizer: object,
    functions: Mapping[str, object] = {},
    **models: object,
) -> None:
    """UserError for an argument of a training function that is of another kind, such as a name in place of a model.

    Args:
        config: the run, of the class `kind`.
        tokenizer: None, or of transformers.
        functions: setting that names such a function -> None, or a function; by the setting's argument.
        models: None, or a model of transformers.
    """
    noun = f"a {kind.__name__}"
    expected: list[tuple[str, bool, str, object, str]] = [("config", isinstance(config, kind), noun, config, "")]
    by_path = "; model.path takes a directory or a name on the Hub"
    for name, model in models.items():
        fits = model is None or (hasattr(model, "config") and hasattr(model, "parameters"))
        expected.append((name, fits, "a model of transformers", model, by_path))
    fits = tokenizer is None or hasattr(tokenizer, "eos_token_id")
    expected.append(("tokenizer", fits, "a tokenizer of transformers", tokenizer, by_path))
    for setting, function in functions.items():
        by_name = f"; {setting} takes its name"
        expected.append((OBJECTS[setting], function is None or callable(function), "a function", function, by_name))
    for name, fits, noun, got, instead in expected:
        if not fits:
            raise UserError(f"{name}: expected {noun}, got {shown(got)}{instead * isinstance(got, str)}")


@by_all_ranks
def check_supervised(
    config: SupervisedConfig,
    train: Source | None,
    held_out: Source | None,
    *wanted: tuple[str, ...],
    given: bool = False,
) -> None:
    """Check the inputs of a stage that learns from examples.

    Args:
        config: the run, which names what is not passed.
        train: examples.
        held_out: the same, for the evaluation.
        wanted: the columns of a row, in each of the forms that the stage takes.
        given: the model and the tokenizer are objects.
    """
    check_packages(config.model, config.log)
    init = getattr(config, "init", None)
    check_models({"init": init} if init else {} if given else {"model.path": config.model.path})
    for name, source in (("train", train), ("held_out", held_out)):
        source = getattr(config.data, name) if source is None else source
        if source is not None:  # `load_data` refuses a run without training examples
            check_columns(source, f"data.{name}", config.data, *wanted)


def check_columns(
    source: Source | None, setting: str, data: DataConfig | ExamplesConfig, *wanted: tuple[str, ...]
) -> list[str]:
    """The columns of the first row of a source; none for a text, or for an iterator, which is read only once.

    Raises UserError for no source, no rows, or a row that has the columns of none of the forms `wanted`.
    """
    if source is None:
        raise UserError(f"{setting}: expected a file of prompts, got null")
    if isinstance(source, Iterator):
        return []
    called = source_name(source, setting)
    for _, row in read_rows(source, setting, data.columns, data.subset):
        if not isinstance(row, Mapping):
            return []
        if any({*form} <= row.keys() for form in wanted):
            return [str(name) for name in row]
        forms = ", or ".join(" and ".join(form) for form in wanted)
        got = f"{', '.join(map(str, row)) or 'none'}; data.columns renames them"
        raise UserError(f"{called}: expected the columns {forms}, got {got}")
    raise UserError(f"{called}: expected at least one row, got none")


@by_all_ranks
def check_ppo(
    config: PPOConfig,
    reward_fn: Callable[..., object] | None = None,
    prompts: Source | None = None,
    eval_prompts: Source | None = None,
    rollout_fn: Callable[..., object] | None = None,
    given: bool = False,
) -> None:
    """Check the inputs of a PPO run; `given`: policy and tokenizer are objects."""
    check_packages(config.model, config.log)
    models = {} if given else {"model.path": config.model.path}
    models |= {"model.value_path": config.model.value_path}
    check_models(models, *config.reward.models)
    source = config.data.prompts if prompts is None else prompts
    columns = PromptColumns(source, "data.prompts", config.data)
    order, by_function = config.data.order, ":" in (config.data.order or "")
    for setting, name in (("data.balance", config.data.balance), ("data.order", None if by_function else order)):
        known = f"a column of the prompts ({', '.join(columns.names) or 'none'})"
        check(name is None or columns.has(name), setting, known, name)
    check_reward(config, reward_fn, columns)
    own: dict[str, tuple[Any, Collection[str]]] = {
        "data.order": (order if by_function else None, ("prompts",)),
        "reward.filter": (config.reward.filter, RESERVED),
        "rollout.function": (rollout_fn or config.rollout.function, ("prompts", "prompt_ids", "sample", "tokenizer")),
    }
    for setting, (function, names) in own.items():
        if function is not None:
            check_arguments(setting, function, names, columns)
    if config.evaluation.every:
        check_evaluation(config, eval_prompts, reward_fn)


def check_packages(model: WeightsConfig, log: RunLogConfig) -> None:
    """UserError for a package that a setting needs and that is not installed."""
    needed = {
        "tensorboard": (log.tensorboard, None),
        "wandb": (log.wandb, "wandb"),
        "bitsandbytes": (model.load_in_4bit, "bitsandbytes"),
        "liger_kernel": (model.kernels == "liger", "liger-kernel"),
    }
    for module, (wanted, package) in needed.items():
        if wanted and not (sys.modules.get(module) or importlib.util.find_spec(module)):
            raise missing_package(module, package)


def check_models(paths: Mapping[str, str | None], *rewards: str) -> None:
    """UserError for a path of a model, by its setting, that is not there and is no name on the Hub."""
    for setting, path in (*paths.items(), *(("reward.models", path) for path in rewards)):
        if path is not None:
            check_local(setting, path)


class PromptColumns:
    """The columns of prompts that go to the user's functions."""

    def __init__(self, source: Any, setting: str, data: DataConfig) -> None:
        self.source, self.setting, self.data = source, setting, data
        self.names = [name for name in check_columns(source, setting, data, ("prompt",)) if name != "prompt"]

    def has(self, name: str) -> bool:
        """Whether any row has that column. An iterator is taken to have it."""
        if name in self.names or isinstance(self.source, Iterator):
            return True
        rows = read_rows(self.source, self.setting, self.data.columns, self.data.subset)
        return any(name in row for _, row in rows if isinstance(row, Mapping))


def check_reward(config: PPOConfig, reward_fn: Callable[..., object] | None, columns: PromptColumns) -> None:
    """Check the reward function, if there is one, and the number of weights."""
    reward = config.reward
    function = reward_fn or reward.function
    if function is not None or not reward.models:
        check_arguments("reward.function", function, RESERVED, columns)
    count = len(reward.models) + (function is not None)
    fits = len(reward.weights) in (0, count)
    check(fits, "reward.weights", f"one for each of the {count} sources", reward.weights)


def check_evaluation(config: PPOConfig, prompts: Source | None, reward_fn: Callable[..., object] | None = None) -> None:
    """Check held-out prompts, which are scored too, evaluators, and the name of the metric that is watched."""
    settings = config.evaluation
    source = settings.prompts if prompts is None else prompts
    columns = PromptColumns(source, "evaluation.prompts", config.data)
    with error_prefix("evaluation.prompts"):
        check_reward(config, reward_fn, columns)
    for spec in settings.evaluators:
        check_arguments("evaluation.evaluators", spec, ("generate", "model", "tokenizer"))
    known = settings.best is None or settings.best in METRICS
    theirs = bool(settings.evaluators) and str(settings.best).startswith("eval/")  # whose names only they know
    check(known or theirs, "evaluation.best", f"one of {', '.join(METRICS)}", settings.best)


def check_arguments(
    setting: str,
    function: Callable[..., object] | str | None,
    names: Collection[str],
    columns: PromptColumns | None = None,
) -> None:
    """UserError for a function that does not take the keywords it is called with, or wants one that is no column."""
    if function is None or isinstance(function, str):
        function = load_callable(function, setting)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return
    keyword = [each for each in parameters if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)]
    taken = {each.name for each in keyword}
    passed = [*names, *(columns.names if columns else ())]
    refused = [name for name in passed if name not in taken]
    if refused and not any(each.kind is each.VAR_KEYWORD for each in parameters):
        raise UserError(
            f"{setting}: expected a function that takes {', '.join(passed)} by keyword, "
            f"got one without {', '.join(refused)}: end its arguments with **columns"
        )
    for each in keyword:
        if each.default is each.empty and each.name not in passed and not (columns and columns.has(each.name)):
            known = ", ".join(passed)
            raise UserError(f"{setting}: expected a function of {known}, got one that also needs {each.name!r}")
