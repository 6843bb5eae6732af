"""Metrics and what a run leaves on disk and on the console."""

import dataclasses
import io
import json
import re
import sys
import types

import pytest
import torch
from rich.console import Console

from ppo_fast.rlhf.config.ppo import PPOConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.ppo.log import RunLog
from ppo_fast.rlhf.ppo.metrics import collect, explained_variance
from ppo_fast.rlhf.ppo.rewards import OwnScores, Rewards
from ppo_fast.rlhf.ppo.update import UpdateStats
from ppo_fast.rlhf.training.finite import require_finite
from ppo_fast.rlhf.training.runtime import Stopwatch
from tests.helpers import raises_exactly
from tests.rlhf.factories import made_experience, made_rollout, padded

NAMES = [
    "objective/kl",
    "objective/entropy",
    "objective/scores",
    "objective/rlhf_reward",
    "objective/non_score_reward",
    "objective/kl_coef",
    "reward/mean",
    "reward/std",
    "policy/approxkl",
    "policy/clipfrac",
    "policy/ratio_mean",
    "policy/ratio_max",
    "loss/policy",
    "loss/value",
    "loss/total",
    "value/clipfrac",
    "value/explained_variance",
    "grad_norm/policy",
    "grad_norm/value",
    "lr",
    "tokens_per_second",
    "length/mean",
    "length/max",
    "length/truncated_frac",
    "rollout/logprob_diff_max",
    "rollout/logprob_diff_mean",
    "hacking/repetition",
    "hacking/distinct_n",
    "hacking/length_reward_corr",
    "time/rollout",
    "time/score",
    "time/logprobs",
    "time/update",
    "memory/peak",
]
SECONDS = {"rollout": 1.0, "logprobs": 0.5, "score": 0.25, "update": 2.25}
WATCH = Stopwatch(torch.device("cpu"))
WATCH.seconds = SECONDS


def made_update(lengths=(2, 4, 3), fill=0.0):
    """Everything `collect` reads, for responses of these lengths."""
    lengths = list(lengths)
    ended = [True] * (len(lengths) - 1) + [False]
    rollout = made_rollout(lengths, ended=ended, width=max(lengths) + 1, fill=fill)
    kl = rollout.logprobs - rollout.ref_logprobs
    scores = torch.arange(len(lengths)).float()
    per_token = -0.1 * kl
    per_token[rollout.cu_seqlens[:-1]] += scores
    ids = [rollout.generation.responses[row, :n].tolist() for row, n in enumerate(lengths)]
    texts, verdicts = [f"answer {n}" for n in lengths], [True] * len(lengths)
    own = OwnScores(("polite", "short"), torch.stack([2 * scores, 5 - scores], dim=1), 5 + scores, 1 + scores)
    rewards = Rewards(per_token, scores, kl, torch.tensor(0.1), ids, texts, verdicts, None, own)
    experience = made_experience(rollout, torch.zeros_like(kl), rollout.values + 1)
    policy_names = ("policy_loss", "entropy", "approx_kl", "clipfrac", "dual_clipfrac", "ratio_mean", "ratio_max")
    policy = {name: torch.tensor(float(number)) for number, name in enumerate(policy_names, start=2)}
    policy["loss"] = torch.tensor(1.0)
    value = {"value_loss": torch.tensor(4.0), "clipfrac": torch.tensor(0.25)}
    stats = UpdateStats(policy, value, torch.tensor([0.5, 0.75]), lr=1e-3, note=None)
    return rollout, rewards, experience, stats


def collected(**kwargs):
    return collect(*made_update(**kwargs), PPOConfig(), WATCH)


def test_every_published_name_is_there():
    assert set(NAMES) <= collected().keys()


def test_the_objective_is_per_sequence_and_the_rest_per_counted_token():
    rollout, rewards, _, _ = made_update()
    metrics, kl = collected(), padded(rewards.kl, rollout.grid.lengths)
    assert metrics["objective/kl"] == pytest.approx(kl.sum(1).mean().item())
    assert metrics["objective/entropy"] == pytest.approx(rollout.entropy.mean().item())
    assert metrics["objective/scores"] == 1
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.1 * kl.sum(1).mean().item(), rel=1e-4)
    assert metrics["objective/rlhf_reward"] == pytest.approx(1 + metrics["objective/non_score_reward"], rel=1e-4)
    own = {name: metrics[f"reward/{name}"] for name in ("mean", "std", "polite/mean", "polite/std", "short/mean")}
    deviation = (2 / 3) ** 0.5
    assert own == pytest.approx(
        {"mean": 6, "std": deviation, "polite/mean": 2, "polite/std": 2 * deviation, "short/mean": 4}
    )
    difference = (rollout.generation.logprobs[rollout.generation.mask] - rollout.logprobs).abs()
    assert metrics["rollout/logprob_diff_max"] == pytest.approx(difference.max().item())
    assert metrics["rollout/logprob_diff_mean"] == pytest.approx(difference.mean().item())
    assert (metrics["length/mean"], metrics["length/max"]) == (3, 4)
    assert metrics["length/truncated_frac"] == pytest.approx(1 / 3)
    assert metrics["tokens_per_second"] == pytest.approx(9 / 4)
    for phase, seconds in SECONDS.items():
        assert metrics[f"time/{phase}"] == seconds
        assert metrics[f"time/{phase}_share"] == pytest.approx(seconds / 4)
        assert metrics[f"tokens_per_second/{phase}"] == pytest.approx(9 / seconds)
    assert metrics["loss/total"] == pytest.approx(1 + 0.5 * 4)
    assert (metrics["grad_norm/policy"], metrics["grad_norm/value"]) == (0.5, 0.75)


def test_rule_10_garbage_in_masked_positions_reaches_no_metric():
    rollout, rewards, experience, stats = made_update(fill=float("nan"))
    dirty = collect(rollout, rewards, experience, stats, PPOConfig(), WATCH)
    clean = collected()
    assert {n: v for n, v in dirty.items() if n != "memory/peak"} == {
        n: v for n, v in clean.items() if n != "memory/peak"
    }


def test_explained_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(returns + 5, returns) == 1
    assert explained_variance(torch.zeros(3), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert explained_variance(returns, torch.ones(3)) == 0


def test_hacking_monitors():
    rollout, rewards, experience, stats = made_update(lengths=(6, 3, 5))
    rewards = dataclasses.replace(rewards, completion_ids=[[7, 7, 7, 7, 7, 7], [1, 2, 3], [1, 2, 3, 4, 5]])
    metrics = collect(rollout, rewards, experience, stats, PPOConfig(), WATCH)
    # 4 + 1 + 3 trigrams: three of the first response repeat; 777, 123, 234 and 345 are distinct.
    assert metrics["hacking/repetition"] == pytest.approx(3 / 8)
    assert metrics["hacking/distinct_n"] == pytest.approx(4 / 8)
    lengths, scores = torch.tensor([6.0, 3.0, 5.0]), rewards.scores
    assert metrics["hacking/length_reward_corr"] == pytest.approx(
        torch.corrcoef(torch.stack([lengths, scores]))[0, 1].item(), rel=1e-5
    )
    assert collected(lengths=(2, 2, 2))["hacking/length_reward_corr"] == 0


def test_a_value_that_is_not_finite_is_named():
    with pytest.raises(UserError, match=r"^values is not finite: nan$"):
        require_finite(logprobs=torch.zeros(2), values=torch.tensor([0.0, float("nan")]))
    rollout, rewards, experience, stats = made_update()
    stats.policy["policy_loss"] = torch.tensor(float("inf"))
    with pytest.raises(UserError, match=r"^loss/policy is not finite: inf$"):
        collect(rollout, rewards, experience, stats, PPOConfig(), WATCH)


@pytest.fixture
def logged(make_config):
    """logged(directory=None, overwrite=False, **log): a RunLog that prints into a string, and that string."""

    def make(*, directory=None, overwrite=False, width=200, force_terminal=False, color_system="auto", **log):
        screen = io.StringIO()
        options = {"width": width, "force_terminal": force_terminal, "color_system": color_system}
        where = {} if directory is None else {"output_dir": str(directory)}
        config = make_config(overwrite=overwrite, log={"console": True, **log}, **where)
        return RunLog(config, Console(file=screen, **options)), screen

    return make


def crash(log, metrics):
    with log:
        log.write(1, metrics)
        log.write(2, metrics, "stopped in epoch 1 of 4")
        lines = (log.directory / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["update"] for line in lines] == [1, 2]
        raise RuntimeError("crash")


def test_a_crashed_run_leaves_a_readable_jsonl(logged):
    log, _ = logged()
    metrics = collected()
    with pytest.raises(RuntimeError, match="crash"):
        crash(log, metrics)
    records = [json.loads(line) for line in (log.directory / "metrics.jsonl").read_text().splitlines()]
    assert records == [{"update": 1, **metrics}, {"update": 2, **metrics, "note": "stopped in epoch 1 of 4"}]
    assert log.history == [metrics, metrics]


SHOWN = {"objective/kl": 2.5, "objective/entropy": 1.25, "policy/clipfrac": 0.125, "eval/scores": 0.5}
PARTS = ["reward +6.000", "KL 2.500", "entropy 1.250", "length 3.0", "clip 0.12", "4.0 s"]


def test_the_console_shows_what_a_person_watches_a_file_on_one_line(logged):
    log, screen = logged()
    with log:
        log.introduce(["llama: 1 M parameters"])
        log.show("rollout", 3, 8)  # a file gets no progress
        log.write(1, collected() | SHOWN, "stopped early")
    assert screen.getvalue().splitlines() == [
        "llama: 1 M parameters",
        "    1/2  " + "  ".join(PARTS),
        "         held out:  scores 0.5",
        "update 1: stopped early",
    ]


@pytest.mark.parametrize("width", [24, 40, 80])
def test_a_terminal_breaks_a_line_between_its_parts(logged, width):
    log, screen = logged(width=width, force_terminal=True, color_system=None)
    with log:
        log.write(1, collected() | SHOWN, "approx_kl 0.0213 > target_kl 0.01")
        log.show("rollout", 3, 8)
        log._progress.refresh()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split(r"[\n\r]", screen.getvalue())]
    assert max(map(len, lines)) <= width
    for part in (*PARTS, "held out:", "scores 0.5"):
        assert sum(part in line for line in lines) == 1
    assert any("sampling 3/8" in line for line in lines)


def test_what_a_text_would_do_to_the_terminal_is_written_out(logged):
    log, screen = logged(samples_every=1, samples=1)
    rollout, rewards, _, _ = made_update()
    evil = "\x1b[31m\x07[bold]\u202e\ud800\x9b2J"
    shown = r"\x1b[31m\x07[bold]\u202e\ud800\x9b2J"
    rollout.generation.prompts.prompts[0] = rewards.completions[0] = evil.replace("\ud800", "")
    with log:
        log.write_samples(1, rollout, rewards)
        log.note(1, evil)
    assert screen.getvalue().count(shown.replace(r"\ud800", "")) == 2
    assert f"update 1: {shown}" in screen.getvalue()
    assert str(UserError(f"got {evil}")) == f"got {shown}"


def test_samples_are_a_table_and_a_file(logged):
    log, screen = logged(samples_every=2, samples=2)
    rollout, rewards, _, _ = made_update()
    with log:
        for update in (1, 2, 3):
            log.write_samples(update, rollout, rewards)
    records = [json.loads(line) for line in (log.directory / "samples.jsonl").read_text().splitlines()]
    first, second = (
        [
            {"update": update, "prompt": "w1", "completion": text, "reward": own, "unpenalized": before, "score": score}
            for text, own, before, score in (("answer 2", 5.0, 1.0, 0.0), ("answer 4", 6.0, 2.0, 1.0))
        ]
        for update in (1, 2)
    )
    assert records == first + second
    assert [f"samples of update {update}" in screen.getvalue() for update in (1, 2, 3)] == [True, True, False]
    assert re.search(r"answer 4 *│ *6\.000 │ *1\.000 │", screen.getvalue())  # the line's reward is the mean of these


def test_markup_in_a_sample_is_text(logged):
    log, screen = logged(samples_every=1)
    rollout, rewards, _, _ = made_update()
    with log:
        log.write_samples(1, rollout, dataclasses.replace(rewards, completions=["[red]x[/red]", "a\nb", "[/]"]))
    assert "[red]x[/red]" in screen.getvalue()
    assert "a b" in screen.getvalue()


def test_tensorboard_holds_every_metric(logged):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log, _ = logged(tensorboard=True)
    metrics = collected()
    with log:
        log.write(1, metrics)
    board = EventAccumulator(str(log.directory / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == metrics.keys()
    assert board.Scalars("lr")[0].value == pytest.approx(1e-3)


def test_weights_and_biases_gets_every_metric(logged, monkeypatch):
    calls = []

    class PPORun:
        log, finish = (lambda self, *a, **k: calls.append((a, k))), (lambda self: calls.append("finish"))

    with raises_exactly("this command needs wandb, which is not installed: pip install wandb", UserError):
        logged(wandb="project")[0].__enter__()
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or PPORun())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log, _ = logged(wandb="project")
    metrics = collected()
    with log:
        log.write(3, metrics)
    directory = str(log.directory)
    settings = {"project": "project", "name": directory, "dir": directory, "config": dataclasses.asdict(log.config)}
    assert calls == [settings, ((metrics,), {"step": 3}), "finish"]


def test_lines_on_the_console_come_as_often_as_asked(logged):
    for print_every, expected in ((2, [2]), (0, [])):
        log, screen = logged(print_every=print_every, overwrite=True)
        with log:
            for update in (1, 2, 3):
                log.write(update, collected())
        assert [int(number) for number in re.findall(r"(\d)/2  reward", screen.getvalue())] == expected


def test_an_earlier_run_is_kept_unless_told_otherwise(logged):
    log, _ = logged()
    with log:
        log.write(1, collected())
    (log.directory / "final").mkdir()
    with pytest.raises(
        UserError,
        match=r"output_dir: '.*run' already holds 'metrics\.jsonl'; choose another \(--out DIR\) or replace it",
    ):
        logged()
    assert (log.directory / "metrics.jsonl").read_text()
    with logged(overwrite=True)[0]:
        assert (log.directory / "metrics.jsonl").read_text() == ""
        assert not (log.directory / "final").exists()


@pytest.mark.parametrize("name", ["final", "checkpoints", "tensorboard", "samples.jsonl"])
def test_what_others_left_in_the_directory_is_never_removed_unasked(logged, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "mine").write_text("x")
    resume = r", continue it \(--resume\)" if name == "checkpoints" else ""
    with pytest.raises(UserError, match=rf"output_dir: '.*run' already holds '{name}'; .*DIR\){resume} or replace"):
        logged()
    assert (tmp_path / "run" / name / "mine").exists()


def test_a_directory_in_which_nothing_was_completed_is_free(logged):
    """A run that ended before its first update left empty files and TensorBoard's events."""
    for _ in range(2):
        with logged(tensorboard=True)[0] as log:
            pass
        (log.directory / "checkpoints").mkdir()
        assert [*(log.directory / "tensorboard").iterdir()]
    with logged(tensorboard=True)[0] as log:
        assert not (log.directory / "checkpoints").exists()
        log.write(1, collected())
    with pytest.raises(UserError, match=r"already holds 'metrics\.jsonl'"):
        logged()


def test_a_directory_that_cannot_be_made_is_an_error(logged, tmp_path):
    (tmp_path / "file").write_text("")
    log, _ = logged(directory=tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"output_dir: cannot make '.*run': Not a directory"):
        log.__enter__()
