"""An error on one of two ranks is one sentence on both, costs nothing that was saved, and leaves the ranks in step.

All cases run in the same two processes: an exchange that one rank missed would spoil those after it.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from ppo_fast.ops import LossOutput
from ppo_fast.rlhf import UserError, train_ppo, train_sft
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.config.supervised import SFTConfig
from ppo_fast.rlhf.integrity import read_sealed, write_sealed
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.ppo import scoring
from ppo_fast.rlhf.ppo import train as ppo_train
from ppo_fast.rlhf.ppo.log import RunLog
from ppo_fast.rlhf.ppo.train import PPORun
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.split import local
from ppo_fast.rlhf.supervised import train as supervised_train
from ppo_fast.rlhf.supervised.sft import SFT
from ppo_fast.rlhf.supervised.train import SupervisedRun
from ppo_fast.rlhf.training import checkpoint, log, loop
from ppo_fast.rlhf.training.checkpoint import STATE, STATE_TENSORS, latest, load_checkpoint
from ppo_fast.rlhf.training.lock import hold_directory
from ppo_fast.rlhf.training.optim import ClippedOptimizer
from ppo_fast.rlhf.training.resume import load_start
from ppo_fast.rlhf.training.signals import Interrupted
from ppo_fast.rlhf.world import current
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.distributed.ranks import run_on_ranks
from tests.rlhf.faults import FULL, Faults, bytes_below
from tests.rlhf.layout_factories import LAYOUTS
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


# Saves that fail, at each call that changes the disk, on rank 0.


def try_saves(directory, sample, **values):
    """Try a fault at calls of the second save, a `sample` of them or all: {(number, name): what came of it}."""
    found, patch, save = {}, pytest.MonkeyPatch(), PPORun.save
    checkpoints, good, faults = directory / "run" / "checkpoints", directory / "good", Faults(patch)

    def put_back():
        faults.arm()
        shutil.rmtree(checkpoints)
        shutil.copytree(good, checkpoints)

    def save_with_faults(self, log):
        if self.done == 1:
            return save(self, log)
        on_main(shutil.copytree, checkpoints, good)
        faults.arm()
        save(self, log)
        calls, others = current().objects(list(faults.calls))
        assert others == []  # rank 0 writes
        contents = {path.name: on_main(bytes_below, path) for path in sorted(checkpoints.iterdir())}
        contents |= {path.name: on_main(bytes_below, path) for path in sorted(good.iterdir())}
        for at, name in enumerate(calls, start=1):
            if name == "rmtree" or (sample and name in calls[: at - 1] and name in calls[at:]):
                continue  # removing asks for no space; a sample is the first and the last call of each kind
            on_main(put_back)
            faults.arm(FULL if current().is_main else None, at if current().is_main else 0)
            message = told(save, self, log)
            faults.arm()
            newest = latest(checkpoints)
            whole = on_main(lambda: bytes_below(newest) == contents[newest.name])  # noqa: B023  # called here
            found[at, name] = message, newest.name, whole, load_checkpoint(checkpoints).state["log"]["done"]
            save(self, log)  # what was left behind is in nobody's way
        return checkpoints

    patch.setattr(PPORun, "save", save_with_faults)
    ppo(directory / "run", **{"checkpoint": {"every": 1, "keep": 1}} | values)
    patch.undo()
    return found


def some_saves(directory):
    return try_saves(directory, sample=True)


def all_saves(directory):
    """Every call in one layout, a sample in the others."""
    runs = {"separate": {"reference": {"update": "ema", "every": 1}}, "shared": {}, "adapters": {}}
    for name in runs:
        (directory / name).mkdir(exist_ok=True)
    return {name: try_saves(directory / name, name != "separate", model=LAYOUTS[name], **runs[name]) for name in runs}


def resumed_after_a_fault(directory):
    """A save of each stage that fails, and the run that goes on from the one before."""
    found = {}
    for stage, kind in ((ppo, PPORun), (sft, SupervisedRun)):
        whole, output, save = directory / f"{stage.__name__}-whole", directory / stage.__name__, kind.save

        def save_with_a_fault(self, log, save=save):
            with pytest.MonkeyPatch.context() as patch:
                if self.done == 2 and current().is_main:
                    Faults(patch).arm(FULL, "safe_save_file")
                return save(self, log)

        stage(whole)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "save", save_with_a_fault)
            message = told(stage, output)
        newest = latest(output / "checkpoints").name
        stage(output, resume=True)
        found[stage.__name__] = message, newest, left_by(output) == left_by(whole)
    return found


# Other errors of one rank.


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
LINE = r" \(test_one_rank_fails\.py:\d+\)"
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


def errors(directory):
    ppo(directory / "whole")
    found = tried(directory, CASES)
    ppo(directory / "on_step", resume=True)
    ppo(directory / "clock", resume=True)
    same = [left_by(directory / name) == left_by(directory / "whole") for name in ("on_step", "clock")]
    return found, same


def more_errors(directory):
    ppo(directory / "whole")
    return tried(directory, MORE), told(ppo, directory / "ended", **failing(1, "on_end"))


def skipped(directory):
    """A bad gradient of rank 1 in a run that skips: the metrics of each rank."""
    found = []
    for stage, owner, name, change in (
        (ppo, Learner, "_value_backward", once(bad_gradient)),
        (sft, ClippedOptimizer, "clip", before_clip),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if current().rank == 1:
                patch.setattr(owner, name, change(getattr(owner, name)))
            result = stage(directory / stage.__name__, on_nan="skip")
        found.append([{n: x for n, x in each.items() if not n.startswith(CLOCK)} for each in result.history])
    return found


def damaged(directory):
    """The sentence about each damage to each file of a checkpoint; and whether the one before it is resumed from."""
    whole, output, found = directory / "whole", directory / "run", {}
    ppo(whole)
    on_main(shutil.copytree, whole, output)
    config, newest = made_config(PPOConfig, PPO, output, {}), output / "checkpoints" / "update-000002"

    def damage(path, content, name):
        """What a run says that resumes from it; on disk it is as it was afterwards."""
        before = path.read_bytes()
        current().objects(None)
        on_main(lambda: path.unlink() if content is None else path.write_bytes(content))
        found[path.name, name] = told(load_start, config, True, "updates")
        on_main(path.write_bytes, before)

    for path in sorted(newest.rglob("*")):
        content = path.read_bytes()
        if path.name != STATE:  # without it there is no checkpoint
            damage(path, None, "missing")
        damage(path, content[: len(content) // 2], "truncated")
        damage(path, bytes([*content[:-1], content[-1] ^ 1]), "flipped")
    damage(newest / STATE, b"{}", "without digests")
    damage(output / "metrics.jsonl", b"", "shorter")
    on_main(cut_moments, newest)
    messages = [told(ppo, output, resume=True)]
    on_main(lambda: (newest / "model.safetensors").unlink())
    messages += told(ppo, output, resume=True), told(ppo, output, resume="update-000001")
    return found, messages, left_by(output) == left_by(whole)


def cut_moments(directory):
    """Another optimizer's moments, with right digests."""
    state, _ = read_sealed(directory / STATE)
    tensors = load_file(directory / STATE_TENSORS)
    name = "state.parts.learner.policy.state.0.exp_avg"
    save_file(tensors | {name: tensors[name][:3].contiguous()}, directory / STATE_TENSORS)
    write_sealed(state, directory / STATE)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    functions = some_saves, resumed_after_a_fault, errors, skipped, damaged
    return run_on_ranks(tmp_path_factory.mktemp("ranks"), *functions)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return run_on_ranks(tmp_path_factory.mktemp("ranks"), all_saves, more_errors, timeout=1800)


def check_saves(found, *kinds_of_layout):
    for main, other in zip(*(each.items() for each in found), strict=True):
        (at, name), (message, newest, whole, done) = main
        assert message == ("[Errno 28] No space left on device", 0), (at, name)
        assert whole, (at, name)
        assert done == int(newest[-6:]), (at, name)
        assert other == ((at, name), (message, newest, None, done))
    kinds = [
        {name for (_, name), (_, newest, *_) in found[0].items() if newest == n}
        for n in ("update-000001", "update-000002")
    ]
    assert kinds[0] >= {"open", "write", "fsync", "mkdir", "rename", "write_text", *kinds_of_layout}
    assert kinds[1] >= {"fsync", "rename"}


def check_cases(found, cases):
    first, second = found
    assert first == second
    assert first.keys() == cases.keys()
    for name, ((message, origin), newest) in first.items():
        case = cases[name]
        assert re.fullmatch(case.message, message), (name, message)
        assert (name, origin, newest) == (name, case.origin, case.end)


def test_a_save_that_fails_on_rank_0_is_told_on_both_and_costs_nothing(ranks):
    check_saves([rank["some_saves"] for rank in ranks], "safe_save_file")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["separate", "shared", "adapters"])
def test_a_fault_at_every_call_of_a_save_is_told_on_both_and_costs_nothing(slow, layout):
    check_saves([rank["all_saves"][layout] for rank in slow], *["safe_save_file"] * (layout != "adapters"))


@pytest.mark.parametrize("stage", ["ppo", "sft"])
def test_after_a_save_that_failed_the_ranks_resume_to_the_same_bits(ranks, stage):
    for rank in ranks:
        (message, origin), newest, same = rank["resumed_after_a_fault"][stage]
        assert re.fullmatch(rf"{NO_SPACE}(update|step)-000001 is complete and resume continues there", message)
        assert origin == 0
        assert newest.endswith("-000001")
        assert same


def test_an_error_of_one_rank_is_that_of_both(ranks):
    check_cases([rank["errors"][0] for rank in ranks], CASES)
    assert [rank["errors"][1] for rank in ranks] == [[True, True]] * 2


@pytest.mark.slow
def test_every_error_of_one_rank_is_that_of_both(slow):
    check_cases([rank["more_errors"][0] for rank in slow], MORE)
    first, (message, origin) = (rank["more_errors"][1] for rank in slow)
    assert first is None  # the run is over
    assert re.fullmatch(BAD, message)
    assert origin is None


def test_a_bad_gradient_of_one_rank_is_skipped_on_both(ranks):
    first, second = (rank["skipped"] for rank in ranks)
    assert first == second
    assert [[metrics.get("nan/skipped_steps") for metrics in stage] for stage in first] == [[1, 0], [None]]
    assert [stage[-1]["nan/skipped_batches"] for stage in first] == [0, 1]


def test_every_damage_to_a_checkpoint_is_told_on_both_and_the_one_before_is_resumed(ranks):
    first, second = (rank["damaged"] for rank in ranks)
    assert first == second
    found, (other, newest, older), same = first
    assert {name for name, _ in found} >= {"model.safetensors", STATE_TENSORS, STATE, "config.json"}
    (shorter, _) = found.pop(("metrics.jsonl", "shorter"))
    assert re.fullmatch(rf"resume: expected \d+ bytes or more in {PATH}, got 0", shorter)
    for (name, _), (message, origin) in found.items():
        damage = rf"{re.escape(name)} (is missing|is not as it was written|is no JSON|has no digests: .*)"
        assert re.fullmatch(f"resume: {PATH} is damaged: {damage}; --resume update-000001 continues .*", message)
        assert origin == 0
    assert other[0].startswith("resume: optimizer state 0: expected 'exp_avg' to be ")
    assert "model.safetensors is missing" in newest[0]
    assert older is None
    assert same
