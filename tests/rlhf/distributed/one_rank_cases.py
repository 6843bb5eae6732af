"""Faults of one rank in a run of :mod:`one_rank`, each with the sentence that both ranks raise."""

import contextlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from ppo_fast.ops import LossOutput
from ppo_fast.rlhf.ppo import scoring
from ppo_fast.rlhf.ppo import train as ppo_train
from ppo_fast.rlhf.ppo.log import RunLog
from ppo_fast.rlhf.ppo.train import PPORun
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.split import local
from ppo_fast.rlhf.supervised import train as supervised_train
from ppo_fast.rlhf.supervised.sft import SFT
from ppo_fast.rlhf.training import checkpoint, log, loop
from ppo_fast.rlhf.training.checkpoint import latest
from ppo_fast.rlhf.training.lock import hold_directory
from ppo_fast.rlhf.training.optim import ClippedOptimizer
from ppo_fast.rlhf.world import current
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.distributed.one_rank import on, on_main, ppo, sft, told
from tests.rlhf.faults import FULL
from tests.rlhf.supervised_factories import rows


class Case(NamedTuple):
    """A run that fails on a rank, and its sentence."""

    origin: int | None  # the rank that says it; None: each for itself
    message: str  # a pattern; PATH is any path
    options: Callable[[], dict[str, Any]] = dict  # of the run, on each rank
    stage: Callable[..., Any] = ppo
    patch: tuple[int, Any, str, Callable] | None = None  # on this rank owner.name is change(owner.name)
    begin: Callable[[Any], Any] = lambda output: None  # before the run, on all ranks
    end: str | None = None  # the newest checkpoint after it


def failing(rank, hook, call=1):
    """A callback that fails on that rank, in that call of one method."""

    def fail(self, *_):
        self.calls += 1
        if current().rank == rank and self.calls == call:
            raise KeyError("x")
        return {} if hook == "state_dict" else None

    others = {"on_end": lambda *_: None, "load_state_dict": lambda *_: None} if hook == "state_dict" else {}
    return {"callbacks": [type("Bad", (), others | {"calls": 0, hook: fail})()]}


def full(real):
    def raises(*_, **__):
        raise FULL

    return raises


def full_at(name):
    """A change of `atomic_directory` that fails for directories of that name."""

    def change(real):
        return lambda target: full(real)() if name in target.parts[-2:] else real(target)

    return change


def fails_on_1():
    if current().rank == 1:
        raise ValueError("no score")


def bad_filter(completions, **_):
    fails_on_1()
    return [True for _ in completions]


def early_evaluator(generate, **_):
    fails_on_1()
    return {"length": len(generate(["w1"])[0])}


def late_evaluator(generate, **_):
    found = generate(["w1"])
    fails_on_1()
    return {"length": len(found[0])}


def bad_rollout(prompt_ids, **_):
    fails_on_1()
    return [(ids, [True] * len(ids), [0.0] * len(ids)) for ids in prompt_ids]


def once(change):
    """A change of a method by `change(result, self)`, in its first call."""

    def changed(real):
        calls = []

        def method(self, *arguments):
            calls.append(1)
            result = real(self, *arguments)
            return change(result, self) if len(calls) == 1 else result

        return method

    return changed


def bad_metric(name):
    return once(lambda metrics, _: metrics | {name: metrics[name] * float("inf")})


def bad_gradient(metrics, learner):
    local(learner.value.split[0][0].grad).view(-1)[:1] = float("nan")
    return metrics


def before_clip(real):
    def clip(self, *scale):
        calls.append(1)
        if len(calls) == 1:
            local(self.split[0][0].grad).view(-1)[:1] = float("nan")
        return real(self, *scale)

    calls = []
    return clip


def bad_score(real):
    def stats(*arguments, **options):
        found = real(*arguments, **options)
        found.logprobs[:1] = -float("inf")
        return found

    return stats


OWN = f"{__name__}:"
PATH = "'[^']*'"
LINE = r" \(one_rank_cases\.py:\d+\)"
KEY = f"failed with KeyError: 'x'{LINE}"
BAD = f"the callback Bad's 'fail' {KEY}"
NO_SCORE = f"failed with ValueError: no score{LINE}"
NO_SPACE = rf"cannot write in {PATH}: \[Errno 28\] No space left on device; "
NONE, FIRST, SECOND = (
    "there is no checkpoint yet",
    *(f"update-00000{number} is complete and resume continues there" for number in (1, 2)),
)
IN_BATCH = f"; the batch and the weights before it are in {PATH}"


def step_of(name, message, method="_policy_backward", change=None):
    """A number of rank 1 in the first minibatch that is not finite."""
    message = f"update 1: epoch 1, minibatch 1: {name} is not finite: {message}{IN_BATCH}"
    key = {"policy/approxkl": "approx_kl", "policy/ratio_max": "ratio_max", "loss/total": "loss"}.get(name)
    return Case(0, message, patch=(1, Learner, method, change or bad_metric(key)))


def resumed(output):
    on_main(shutil.copytree, output.parent / "whole", output)


def held(output):
    stack = contextlib.ExitStack()
    stack.enter_context(hold_directory(output))
    return stack


def evaluated(name):
    return lambda: {"evaluation": {"every": 1, "evaluators": [OWN + name]}}


CASES = {  # of each kind one: in `make check`
    "on_step": Case(1, f"update 2: {BAD}", lambda: failing(1, "on_step", 2), end="update-000001"),
    "state_dict": Case(
        1, f"the callback Bad's 'state_dict' {KEY}", lambda: failing(1, "state_dict", 3), end="update-000001"
    ),
    "evaluator": Case(1, f"update 1: the evaluator 'early_evaluator' {NO_SCORE}", evaluated("early_evaluator")),
    "data": Case(1, r"prompts\[4\]: expected .*, got 3", lambda: {"prompts": on(1, [*PROMPTS, 3], PROMPTS)}),
    "other data": Case(
        1,
        "torchrun: expected the prompts of rank 0 on all ranks, got others on rank 1",
        lambda: {"prompts": on(1, PROMPTS[1:], PROMPTS)},
    ),
    "other callbacks": Case(
        1,
        "callbacks: expected callback Bad on all ranks, as on rank 0, got none on rank 1",
        lambda: on(1, {}, failing(0, "on_step")),
    ),
    "log": Case(0, NO_SPACE + NONE, patch=(0, log, "_line", full)),
    "final": Case(
        0, NO_SPACE + SECOND, patch=(0, checkpoint, "atomic_directory", full_at("final")), end="update-000002"
    ),
    "gradient": step_of("grad_norm/value", "nan", "_value_backward", once(bad_gradient)),
    "restore": Case(
        1,
        rf"resume: cannot restore {PATH}: OSError: \[Errno 28\] No space left on device",
        lambda: {"resume": True},
        patch=(1, PPORun, "_load", full),
        begin=resumed,
        end="update-000002",
    ),
    "clock": Case(
        None,
        f"max_hours: stopped after update 1; saved {PATH}, --resume continues there",
        lambda: {"max_hours": on(1, 1e-9, None)},
        end="update-000001",
    ),
}
MORE = {
    "on_checkpoint": Case(0, f"update 1: {BAD}", lambda: failing(0, "on_checkpoint"), end="update-000001"),
    "rollout": Case(1, f"update 1: the rollout function 'bad_rollout' {NO_SCORE}", lambda: {"rollout_fn": bad_rollout}),
    "another run": Case(
        0,
        rf"resume: optim\.lr: expected 0\.001 as in {PATH}, got 0\.5",
        lambda: {"resume": True, "optim": {"lr": 0.5}},
        begin=resumed,
        end="update-000002",
    ),
    "sft callback": Case(1, f"step 2: {BAD}", lambda: failing(1, "on_step", 2), sft, end="step-000001"),
    "on_start": Case(1, BAD, lambda: failing(1, "on_start")),
    "filter": Case(
        1, f"update 1: the filter 'bad_filter' {NO_SCORE}", lambda: {"reward": {"filter": f"{OWN}bad_filter"}}
    ),
    "in use": Case(0, f"output_dir: {PATH} is in use by process .*", begin=held),
    "sft gradient": Case(
        0,
        f"step 1: grad_norm is not finite: nan{IN_BATCH}",
        stage=sft,
        patch=(1, ClippedOptimizer, "clip", before_clip),
    ),
    "no data": Case(1, "data.prompts: .*nowhere.*", lambda: {"prompts": on(1, "nowhere.jsonl", PROMPTS)}),
    "on_start 0": Case(0, BAD, lambda: failing(0, "on_start")),
    "on_step 0": Case(0, f"update 2: {BAD}", lambda: failing(0, "on_step", 2), end="update-000001"),
    "on_checkpoint 1": Case(1, f"update 1: {BAD}", lambda: failing(1, "on_checkpoint"), end="update-000001"),
    "first state_dict": Case(1, f"the callback Bad's 'state_dict' {KEY}", lambda: failing(1, "state_dict")),
    "late evaluator": Case(1, f"update 1: the evaluator 'late_evaluator' {NO_SCORE}", evaluated("late_evaluator")),
    "callbacks": Case(1, "callbacks: expected a list of callbacks, got 3", lambda: {"callbacks": on(1, 3, [])}),
    "no file": Case(
        1,
        r"reward\.filter: no such file 'nowhere\.py' in .*",
        lambda: {"reward": {"filter": on(1, "nowhere.py:f", None)}},
    ),
    "not writable": Case(
        0,
        f"output_dir: cannot write in {PATH}: Is a directory",
        begin=lambda output: on_main(lambda: (output / ".lock").mkdir(parents=True)),
    ),
    "board": Case(0, NO_SPACE + NONE, patch=(0, RunLog, "_open_board", full)),
    "config": Case(0, NO_SPACE + NONE, patch=(0, ppo_train, "save_config", full)),
    "settle": Case(0, NO_SPACE + NONE, patch=(0, loop, "settle", full)),
    "best": Case(
        0,
        NO_SPACE + NONE,
        lambda: {"evaluation": {"every": 1, "best": "eval/scores"}},
        patch=(0, checkpoint, "atomic_directory", full_at("best")),
    ),
    "failed": Case(
        0,
        NO_SPACE + NONE,
        lambda: {"reward_fn": lambda completions, **_: [float("nan") for _ in completions]},
        patch=(0, checkpoint, "atomic_directory", full_at("failed")),
    ),
    "position": Case(0, NO_SPACE + NONE, patch=(0, RunLog, "position", full)),
    "prune": Case(0, NO_SPACE + FIRST, patch=(0, checkpoint, "_prune", full), end="update-000001"),
    "read": Case(
        1,
        rf"resume: {PATH} is damaged: \[Errno 28\] .*",
        lambda: {"resume": True},
        patch=(1, checkpoint, "read_tensors", full),
        begin=resumed,
        end="update-000002",
    ),
    "supersede": Case(
        0,
        rf"resume: cannot restore {PATH}: OSError: \[Errno 28\] No space left on device",
        lambda: {"resume": "update-000001"},
        patch=(0, loop, "supersede_newer", full),
        begin=resumed,
        end="update-000002",
    ),
    "policy loss": step_of("loss/total", "(-?inf|nan)"),
    "approx_kl": step_of("policy/approxkl", "(-?inf|nan)"),
    "ratio": step_of("policy/ratio_max", "inf"),
    "score": Case(0, f"update 1: logprobs is not finite: -inf{IN_BATCH}", patch=(1, scoring, "_stats", bad_score)),
    "sft data": Case(1, ".*nowhere.*", lambda: {"train": on(1, "nowhere.jsonl", rows(8))}, sft),
    "sft other data": Case(
        1,
        "torchrun: expected the training examples of rank 0 on all ranks, got others on rank 1",
        lambda: {"train": on(1, rows(8, 3), rows(8))},
        sft,
    ),
    "sft loss": Case(
        0,
        f"step 1: loss is not finite: inf{IN_BATCH}",
        stage=sft,
        patch=(1, SFT, "loss", once(lambda output, _: LossOutput(output.loss * float("inf"), output.metrics))),
    ),
    "sft final": Case(
        0,
        NO_SPACE + "step-000002 is complete and resume continues there",
        stage=sft,
        patch=(0, checkpoint, "atomic_directory", full_at("final")),
        end="step-000002",
    ),
    "sft config": Case(0, NO_SPACE + NONE, stage=sft, patch=(0, supervised_train, "save_config", full)),
}


def tried(directory, cases):
    """The sentence of each case, its origin, and the newest checkpoint that it left."""
    found = {}
    for name, case in cases.items():
        output = directory / name
        with contextlib.ExitStack() as stack:
            begun = case.begin(output)
            if begun is not None:
                stack.enter_context(begun)
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if case.patch is not None and case.patch[0] == current().rank:
                _, owner, attribute, change = case.patch
                patch.setattr(owner, attribute, change(getattr(owner, attribute)))
            found[name] = told(case.stage, output, **case.options())
        newest = latest(output / "checkpoints")
        found[name] = found[name], newest and newest.name
        assert current().objects(name) == [name] * 2  # the ranks are in step
    return found
