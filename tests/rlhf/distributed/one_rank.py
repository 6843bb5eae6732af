"""Runs of two steps on two ranks, and what a run leaves and says when one rank fails."""

import json

from ppo_fast.rlhf import UserError, train_ppo, train_sft
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.supervised import SFTConfig
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.training.signals import Interrupted
from ppo_fast.rlhf.world import current
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.supervised_factories import make_tokenizer, rows

CLOCK = ("time/", "tokens_per_second", "memory/", "perf/")
QUIET = {"threads": 1, "checkpoint": {"every": 1}, "log": {"tensorboard": False, "console": False}}
PPO = {
    **QUIET,
    "updates": 2,
    "rollout": {"batch_size": 4, "max_new_tokens": 3},
    "optim": {"lr": 1e-3, "value_lr": 1e-3, "minibatch_size": 2, "epochs": 1},
}
SUPERVISED = {**QUIET, "optim": {"lr": 1e-3, "batch_size": 4}}


def reward(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def made_config(kind, base, output, values):
    values = {name: base.get(name, {}) | x if isinstance(x, dict) else x for name, x in values.items()}
    return config_from_dict(base | values | {"output_dir": str(output)}, kind=kind)


def make_model():
    return tiny.make_model(64, hidden=16, layers=1, heads=2)


def ppo(output, *, prompts=PROMPTS, reward_fn=reward, rollout_fn=None, resume=False, callbacks=(), **values):
    """Two updates of a fresh tiny model, each saved."""
    config = made_config(PPOConfig, PPO, output, values)
    given = {"policy": make_model(), "tokenizer": make_tokenizer(), "prompts": prompts, "rollout_fn": rollout_fn}
    given["eval_prompts"] = ["w1", "w3 w4"] if config.evaluation.every else None
    return train_ppo(config, reward_fn=reward_fn, callbacks=callbacks, resume=resume, **given)


def sft(output, *, train=None, resume=False, callbacks=(), **values):
    """Two steps of a fresh tiny model, each saved."""
    config = made_config(SFTConfig, SUPERVISED, output, values)
    given = {"model": make_model(), "tokenizer": make_tokenizer(), "held_out": rows(3, 1)}
    return train_sft(config, train=train or rows(8), callbacks=callbacks, resume=resume, **given)


def told(function, *arguments, **options):
    """The sentence of what fails, and the rank that it came from."""
    try:
        function(*arguments, **options)
    except (UserError, OSError) as error:
        return str(error), error.origin
    except Interrupted as stopped:
        return str(stopped), None


def left_by(directory):
    """What must not depend on where a run was stopped."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    metrics = [{n: x for n, x in record.items() if not n.startswith(CLOCK)} for record in records]
    return metrics, {path.name: path.read_bytes() for path in (directory / "final").glob("*.safetensors")}


def on_main(function, *arguments):
    """Its result on rank 0, None on the others; all wait."""
    result = function(*arguments) if current().is_main else None
    current().objects(None)
    return result


def on(rank, bad, good):
    return bad if current().rank == rank else good
