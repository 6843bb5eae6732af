"""SFT, reward model and DPO that are stopped end with the bits of the run that never stopped, and lose nothing."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppo_fast import cli
from ppo_fast.ops import LossOutput
from ppo_fast.rlhf import UserError
from ppo_fast.rlhf.data.examples import collate
from ppo_fast.rlhf.supervised.dpo import DPO
from ppo_fast.rlhf.supervised.reward_model import RewardModel
from ppo_fast.rlhf.supervised.sft import SFT
from ppo_fast.rlhf.supervised.train import SupervisedRun, completion_logprobs
from ppo_fast.rlhf.training import checkpoint
from ppo_fast.rlhf.training.optim import ClippedOptimizer
from ppo_fast.rlhf.training.signals import Interrupted
from tests.helpers import raises_exactly
from tests.rlhf.models.test_forward import make
from tests.rlhf.supervised_factories import STAGES, make_model, make_tokenizer, ragged, rows

OBJECTIVES = {"sft": SFT, "reward": RewardModel, "dpo": DPO}
each_stage = pytest.mark.parametrize("stage", STAGES)
TWO_EPOCHS = {"epochs": 2}  # of 5 steps: 36 examples in batches of 8
SAVED = {"checkpoint": {"every": 3}, "log": {"eval_every": 2}}


def left_by(directory):
    """What must not depend on where a run was stopped: final model, last checkpoint, metrics without the clock's."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {n: x for n, x in record.items() if not n.startswith(("time/", "tokens_per_second"))} for record in records
    ]
    files = [*(directory / "final").iterdir(), *(directory / "checkpoints/step-000010").glob("*.safetensors")]
    return metrics, {str(path.relative_to(directory)): path.read_bytes() for path in files}


def weights_of(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()


class Stop(BaseException):
    """Ends a run where it stands."""


@pytest.fixture
def before_step(monkeypatch):
    """before_step(number, action): what happens in that step of the next runs, before its optimizer step."""

    def go(number, action):
        clip = ClippedOptimizer.clip

        def acting(self, *scale):
            calls.append(1)
            if len(calls) == number:
                action(self)
            return clip(self, *scale)

        calls = []
        monkeypatch.setattr(ClippedOptimizer, "clip", acting)

    return go


def stop(network):
    raise Stop


def poison(network):
    network.parameters[0].grad.view(-1)[3] = float("nan")


@pytest.fixture
def run(run_stage):
    """`run_stage`, from one state of torch's global generator, or from another when it resumes."""

    def go(stage, *, resume=False, **values):
        torch.manual_seed(9 if resume else 0)
        return run_stage(stage, resume=resume, **values)

    return go


@pytest.fixture
def whole(run, tmp_path):
    """whole(stage) -> what the run leaves that never stops."""

    def go(stage, **values):
        return left_by(run(stage, optim=TWO_EPOCHS, output_dir=str(tmp_path / "whole"), **SAVED, **values).directory)

    return go


@each_stage
@pytest.mark.parametrize("stopped_in", [5, 8])
def test_rule_16_a_resumed_run_ends_with_the_same_bits(run, whole, before_step, tmp_path, stage, stopped_in):
    expected = whole(stage)
    assert [record["step"] for record in expected[0] if "eval/loss" in record] == [2, 4, 6, 8, 10]
    before_step(stopped_in, stop)
    with pytest.raises(Stop):
        run(stage, optim=TWO_EPOCHS, **SAVED)
    checkpoints = tmp_path / stage / "checkpoints"
    assert max(os.listdir(checkpoints)) == f"step-{(stopped_in - 1) // 3 * 3:06d}"
    assert len((tmp_path / stage / "metrics.jsonl").read_text().splitlines()) == stopped_in - 1
    resumed = run(stage, optim=TWO_EPOCHS, **SAVED, resume=True)
    assert left_by(resumed.directory) == expected
    assert [metrics["epoch"] for metrics in resumed.history] == [n / 5 for n in range(1, 11)]
    assert sorted(os.listdir(checkpoints)) == ["step-000009", "step-000010"]
    saved = STAGES[stage][2].from_pretrained(checkpoints / "step-000010")
    assert torch.equal(weights_of(saved), weights_of(resumed.trained))


@each_stage
def test_an_older_checkpoint_is_resumed_to_the_same_bits(run, whole, tmp_path, stage):
    expected = whole(stage)
    run(stage, optim=TWO_EPOCHS, **SAVED | {"checkpoint": {"every": 3, "keep": 0}})
    resumed = run(stage, optim=TWO_EPOCHS, **SAVED | {"checkpoint": {"every": 3, "keep": 0}}, resume="step-000006")
    assert left_by(resumed.directory) == expected
    assert sorted(os.listdir(tmp_path / stage / "checkpoints")) == [f"step-{n:06d}" for n in (3, 6, 9, 10)]


@each_stage
def test_more_epochs_continue_a_run_that_ended(run, whole, stage):
    constant = {"warmup_frac": 0.0, "final_lr_frac": 1.0}  # so that the number of epochs sets no rate
    whole_run = run(stage, optim=TWO_EPOCHS | constant, **SAVED)
    expected = left_by(whole_run.directory)
    run(stage, optim={"epochs": 1} | constant, **SAVED, overwrite=True)
    saved = SAVED | {"checkpoint": {"every": 3, "keep": 1}}
    resumed = run(stage, optim=TWO_EPOCHS | constant, **saved, resume=True)
    metrics, files = left_by(resumed.directory)
    assert metrics[:4] + metrics[5:] == expected[0][:4] + expected[0][5:]
    assert metrics[4].keys() > expected[0][4].keys()  # the shorter run evaluated after its last step
    for each in (files, expected[1]):  # the card's table has the metrics
        del each["final/README.md"]
    assert files == expected[1]
    assert os.listdir(resumed.directory / "checkpoints") == ["step-000010"]


@pytest.mark.parametrize(
    ("stage", "number"), [("sft", signal.SIGINT), ("reward", signal.SIGTERM), ("dpo", signal.SIGINT)]
)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    run, whole, before_step, tmp_path, capfd, stage, number
):
    expected = whole(stage)
    before_step(4, lambda network: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as stopped:
        run(stage, optim=TWO_EPOCHS, log={"eval_every": 2})
    saved = str(tmp_path / stage / "checkpoints" / "step-000004")
    assert str(stopped.value) == f"{number.name}: stopped after step 4; saved {saved!r}, --resume continues there"
    assert "ppo-fast: stopping after this step, then saving" in capfd.readouterr().err
    assert left_by(run(stage, optim=TWO_EPOCHS, **SAVED, resume=True).directory) == expected


@each_stage
def test_a_bad_gradient_stops_before_the_step_with_the_batch_saved(run, before_step, tmp_path, stage):
    before = []
    before_step(3, lambda network: (poison(network), before.append([p.detach().clone() for p in network.parameters])))
    failed = tmp_path / stage / "failed" / "step-000003"
    told = f"step 3: grad_norm is not finite: nan; the batch and the weights before it are in {str(failed)!r}"
    with raises_exactly(told, UserError):
        run(stage)
    saved = STAGES[stage][2].from_pretrained(failed)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), before[0], strict=True))
    record, batch = json.loads((failed / "batch.json").read_text()), load_file(failed / "batch.safetensors")
    assert record["error"] == "grad_norm is not finite: nan"
    assert len(set(record["rows"])) == len(record["examples"]) == 8
    given = rows(40)
    if stage == "sft":
        texts, count = {(row["prompt"], row["completion"]) for row in given}, 8
    else:
        texts, count = {(row["prompt"], row[name]) for row in given for name in ("chosen", "rejected")}, 16
    tokenizer = make_tokenizer()
    assert len(record["prompts"]) == len(record["completions"]) == len(batch["mask"]) == count
    known = {(" ".join(a.split()), " ".join(b.split())) for a, b in texts}
    for prompt, completion, ids, attended in zip(
        record["prompts"], record["completions"], batch["input_ids"], batch["attention_mask"], strict=True
    ):
        words = completion.removesuffix(tokenizer.eos_token)
        assert (" ".join(prompt.split()), " ".join(words.split())) in known
        assert tokenizer.decode(ids[attended]).split() == (prompt + " " + completion).split()


@each_stage
def test_a_bad_loss_is_told_by_its_name(run, monkeypatch, stage):
    loss, calls = OBJECTIVES[stage].loss, []

    def infinite(self, examples):
        calls.append(1)
        output = loss(self, examples)
        return LossOutput(output.loss * float("inf"), output.metrics) if len(calls) == 2 else output

    monkeypatch.setattr(OBJECTIVES[stage], "loss", infinite)
    with pytest.raises(
        UserError, match=r"^step 2: loss is not finite: inf; the batch and the weights before it are in"
    ):
        run(stage)


@each_stage
def test_skip_leaves_the_step_out_and_counts_it(run, before_step, monkeypatch, stage):
    seen, train = [], SupervisedRun._train

    def watched(self, number, examples):
        moments = [t.clone() for s in self.network.optimizer.state.values() for t in s.values()]
        seen.append((weights_of(self.objective.model), moments))
        return train(self, number, examples)

    monkeypatch.setattr(SupervisedRun, "_train", watched)
    before_step(2, poison)
    result = run(stage, on_nan="skip", checkpoint={"every": 2})
    (_, _), (weights, moments), (after, moments_after), *_ = seen
    assert torch.equal(weights, after)
    assert moments
    assert all(torch.equal(a, b) for a, b in zip(moments, moments_after, strict=True))
    assert not torch.equal(after, seen[3][0])
    records = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["nan/skipped_batches"]) for r in records] == [(1, 0), (3, 1), (4, 1), (5, 1)]
    assert not (result.directory / "failed").exists()
    longer = run(stage, on_nan="skip", optim=TWO_EPOCHS, resume=True)
    assert longer.history[-1]["nan/skipped_batches"] == 1


def test_an_evaluation_is_not_left_out_with_a_skipped_step(run, before_step):
    before_step(5, poison)
    result = run("sft", on_nan="skip")
    assert result.history[-1].keys() == {"eval/loss", "eval/perplexity", "nan/skipped_batches"}


@each_stage
def test_a_full_disk_is_one_sentence_and_costs_nothing(run, whole, tmp_path, monkeypatch, stage):
    expected, calls, save = whole(stage), [], checkpoint.save_tensors
    full = OSError(errno.ENOSPC, "No space left on device")

    def fails_once(tensors, path):
        calls.append(1)
        if len(calls) == 2:
            raise full
        save(tensors, path)

    monkeypatch.setattr(checkpoint, "save_tensors", fails_once)
    told = f"cannot write in {str(tmp_path / stage)!r}: {full}; step-000003 is complete and resume continues there"
    with raises_exactly(told, UserError):
        run(stage, optim=TWO_EPOCHS, **SAVED)
    assert os.listdir(tmp_path / stage / "checkpoints") == ["step-000003"]
    assert left_by(run(stage, optim=TWO_EPOCHS, **SAVED, resume=True).directory) == expected


@each_stage
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optim": {"lr": 0.5}}, r"optim\.lr: expected 0\.001 as in '.*step-000010', got 0\.5"),
        ({"seed": 3}, r"seed: expected 0 as in '.*step-000010', got 3"),
        ({"optim": {"epochs": 1}}, r"steps of optim\.epochs: expected at least the 10 that are done, got 5"),
        ({"examples": rows(39)}, r"expected the training examples that the run was begun with, got others"),
        ({"policy": make_model(seed=1)}, r"expected the model weights that the run was begun with, got others"),
    ],
)
def test_another_run_is_not_resumed(run, tmp_path, stage, values, message):
    run(stage, optim=TWO_EPOCHS, **SAVED)
    before = {path: path.read_bytes() for path in (tmp_path / stage).rglob("*") if path.is_file()}
    given = {"optim": TWO_EPOCHS, **SAVED} | values
    given["optim"] = TWO_EPOCHS | given["optim"]
    with pytest.raises(UserError, match=f"^resume: {message}$"):
        run(stage, resume=True, **given)
    assert {path: path.read_bytes() for path in (tmp_path / stage).rglob("*") if path.is_file()} == before


def test_other_held_out_examples_are_told(run, tmp_path):
    path = tmp_path / "held_out.jsonl"
    given = {"data": {"held_out": str(path)}, **SAVED}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(3, seed=9)))
    run("sft", **given)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(3, seed=8)))
    with raises_exactly("resume: expected the held-out examples that the run was begun with, got others", UserError):
        run("sft", resume=True, optim=TWO_EPOCHS, **given)


@each_stage
def test_the_command_resumes_with_the_config_of_the_checkpoint(tmp_path, monkeypatch, capsys, stage):
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    make_tokenizer().save_pretrained("model")
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(20)))
    quiet = ["--threads", "1", "--log.no-console", "--log.no-tensorboard", "--checkpoint.every", "2"]
    assert cli.main([stage, "--model", "model", "--data", "rows.jsonl", "--out", "run", "--seed", "5", *quiet]) == 0
    assert cli.main([stage, "--resume", "--out", "run", "--optim.epochs", "2", "--checkpoint.keep", "1"]) == 0
    assert os.listdir("run/checkpoints") == ["step-000004"]
    assert "seed: 5" in Path("run/config.yaml").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == "model: run/final"
    assert cli.main([stage, "--resume", "--out", "elsewhere"]) == 2
    told = "ppo-fast: resume: expected a complete checkpoint in 'elsewhere/checkpoints', got none\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_model_that_scales_its_logits_is_refused_by_name_or_trained_through_them(run, tmp_path, stage):
    with pytest.raises(UserError, match=r"^model\.fused_head: expected CohereForCausalLM to have .*false"):
        run(stage, policy=make("Cohere"))
    assert not (tmp_path / stage).exists()
    run(stage, policy=make("Cohere"), model={"fused_head": False})


def test_a_reward_model_has_no_logits_to_refuse(run):
    policy = make_model()
    policy.get_output_embeddings().register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UserError, match=r"^model\.fused_head: expected LlamaForCausalLM to have"):
        run("sft", policy=policy)
    run("reward", policy=policy)


def test_an_architecture_without_a_reward_model_is_refused(run):
    told = "model.path: expected an architecture that transformers has a sequence classifier of, got CohereConfig"
    with raises_exactly(told, UserError):
        run("reward", policy=make("Cohere"))


def test_materialized_logits_are_the_models_own():
    model, batch = make("Cohere"), collate(ragged(), 0, torch.device("cpu"))
    logits = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, :-1]
    expected = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0][batch.mask[:, 1:]]
    torch.testing.assert_close(completion_logprobs(model, batch, linear=False), expected)


@pytest.mark.parametrize("other", [{"fused_head": False}, {"packing": True}])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_all_ways_to_the_log_probabilities_train_alike(run, tmp_path, stage, other):
    first, second = (run(stage, model=way, output_dir=str(tmp_path / str(len(way)))) for way in ({}, other))
    for a, b in zip(first.history, second.history, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)


def test_what_a_kill_left_goes_at_the_next_start(run_stage, tmp_path):
    run_stage("sft", checkpoint={"every": 5})
    directory = tmp_path / "sft"
    held = sorted(path for path in directory.rglob("*") if path.is_dir())
    for name in (".final.new", "checkpoints/.step-000005.removed", "checkpoints/.step-000006.new"):
        (directory / name).mkdir()
    (directory / ".profile.old").touch()  # not ours
    (directory / "final").rename(directory / ".final.old")  # between the two steps of an exchange
    result = run_stage("sft", checkpoint={"every": 5}, resume=True)
    assert sorted(path for path in directory.rglob("*") if path.is_dir()) == held
    assert (result.model / "model.safetensors").is_file()
    assert (directory / ".profile.old").is_file()


def test_an_overwritten_run_leaves_what_links_name_as_it_is(run_stage, tmp_path):
    directory, disk = tmp_path / "sft", tmp_path / "disk"
    names = ["checkpoints", "final", "metrics.jsonl"]
    run_stage("sft", checkpoint={"every": 2})
    disk.mkdir()
    for name in names:
        (directory / name).rename(disk / name)
        (directory / name).symlink_to(disk / name)
    before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
    with pytest.warns(
        UserWarning, match=r"^output_dir: '.*' is no longer a link to '.*', which stays as it is$"
    ) as told:
        run_stage("sft", rows(16, seed=1), checkpoint={"every": 1}, overwrite=True)
    assert len(told) == len(names)
    assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    assert not any((directory / name).is_symlink() for name in names)
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
