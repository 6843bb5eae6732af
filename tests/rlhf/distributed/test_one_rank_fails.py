"""An error on one of two ranks is one sentence on both, costs nothing that was saved, and leaves the ranks in step.

All cases run in the same two processes: an exchange that one rank missed would spoil those after it.
"""

import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.integrity import read_sealed, write_sealed
from ppo_fast.rlhf.ppo.train import PPORun
from ppo_fast.rlhf.ppo.update import Learner
from ppo_fast.rlhf.supervised.train import SupervisedRun
from ppo_fast.rlhf.training.checkpoint import STATE, STATE_TENSORS, latest, load_checkpoint
from ppo_fast.rlhf.training.optim import ClippedOptimizer
from ppo_fast.rlhf.training.resume import load_start
from ppo_fast.rlhf.world import current
from tests.rlhf.distributed.one_rank import CLOCK, PPO, left_by, made_config, on_main, ppo, sft, told
from tests.rlhf.distributed.one_rank_cases import (
    BAD,
    CASES,
    MORE,
    NO_SPACE,
    PATH,
    bad_gradient,
    before_clip,
    failing,
    once,
    tried,
)
from tests.rlhf.distributed.ranks import run_on_ranks
from tests.rlhf.faults import FULL, Faults, bytes_below
from tests.rlhf.layout_factories import LAYOUTS

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
