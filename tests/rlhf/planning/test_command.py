"""`ppo-fast plan`, and the plan that a run prints before it begins."""

import dataclasses
import io

import pytest
from rich.console import Console

from ppo_fast import cli
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.planning.command import announce, describe, parse_size, print_plan
from ppo_fast.rlhf.planning.plan import Change, Plan
from tests.helpers import raises_exactly
from tests.rlhf.planning.factories import GIB, make_config, tiny_policy


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("22.5 gib", 22.5 * GIB), ("512MiB", 2**29), ("1MB", 1e6)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "0GB", "24GBs", ""])
def test_other_sizes_are_refused(text):
    with raises_exactly(f"--gpu: expected a size such as 24GB or 22.5GiB, got {text!r}", UserError):
        parse_size(text)


def test_the_command_prints_table_peak_and_verdict(command, capsys):
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "memory by phase, MiB"
    for name in ("rollout", "scoring", "update"):
        assert name in lines[2]
    items = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert items == ["weights", "gradients", "optimizer states", "KV cache", "activations", "logits chunk", "all"]
    assert lines[-1].startswith("peak ")
    assert lines[-1].endswith(" MiB in update")


@pytest.mark.slow
def test_the_command_says_what_to_change(command, capsys):
    assert cli.main([*command, "--gpu", "660MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("│ CUDA context") for line in lines)
    verdict, first, *_ = [line for line in lines if line.startswith(("peak", "  set"))]
    assert "of 660.0 MiB: does not fit by" in verdict
    assert first.startswith("  set optim.micro_batch_size to ")
    assert cli.main([*command, "--gpu=24GB"]) == 0
    assert "to spare" in capsys.readouterr().out.splitlines()[-1]


def test_the_table_comes_at_once_and_each_change_as_it_is_found():
    plan = Plan({"rollout": {"weights": 3 * GIB}, "update": {"weights": 4 * GIB}}, host=GIB, limit=2 * GIB)
    changed = dataclasses.replace(plan, phases={"update": {"weights": 5 * GIB // 2}})
    seen, printed = recording_console(), []

    def changes():
        printed.append(seen.file.getvalue())
        yield Change("model.layout", "adapters", changed)
        printed.append(seen.file.getvalue())

    print_plan(plan, changes(), seen)
    lines = seen.file.getvalue().splitlines()
    assert lines[-4:] == [
        "peak 4.0 GiB in update, of 2.0 GiB: does not fit by 2.0 GiB",
        "1.0 GiB of models wait in host memory",
        "  set model.layout to adapters and model.lora.rank to 64: peak 2.5 GiB",
        "that is not enough: take shorter responses or a smaller model",
    ]
    assert [text.splitlines()[-1] for text in printed] == lines[-3:-1]
    fits = dataclasses.replace(plan, limit=5 * GIB, host=0)
    assert describe(fits) == ["peak 4.0 GiB in update, of 5.0 GiB: 1.0 GiB to spare"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "model.path: expected a model directory or hub id, got null"),
        (["plan", "--gpu"], "--gpu: expected a size such as 24GB or 22.5GiB, got ''"),
        (["plan", "--model", "model", "--gpu", "big"], "--gpu: expected a size such as 24GB or 22.5GiB, got 'big'"),
        (["plan", "--optim.lrr", "1"], "no option '--optim.lrr', the nearest is '--optim.lr'"),
    ],
)
def test_mistakes_are_one_line(command, capsys, arguments, message):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"ppo-fast: {message}\n"


def test_a_directory_without_a_config_is_one_line(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["plan", "--model", "empty"]) == 2
    printed = capsys.readouterr().err
    assert printed == "ppo-fast: AutoConfig: cannot load directory 'empty': it has no config.json\n"


def test_help(capsys):
    assert cli.main(["plan", "--help"]) == 0
    assert "--gpu SIZE" in capsys.readouterr().out


@pytest.fixture
def saved(tmp_path):
    """A run of a model directory that holds only a config."""
    tiny_policy().config.save_pretrained(str(tmp_path / "model"))
    return make_config(tmp_path / "run", model={"path": str(tmp_path / "model")})


def recording_console(**options):
    return Console(record=True, width=100, file=io.StringIO(), **options)


def test_a_plan_is_announced_on_the_console_alone(saved, monkeypatch):
    seen, quiet = recording_console(), recording_console(quiet=True)
    announce(saved, seen)
    assert seen.export_text() == ""  # it is tiny
    monkeypatch.setattr("ppo_fast.rlhf.planning.command.TINY", 0)
    announce(saved, seen)
    assert "memory by phase" in seen.export_text()
    announce(saved, quiet)
    assert quiet.export_text() == ""


def test_the_train_command_announces_the_plan_of_its_config(command, monkeypatch, capsys):
    monkeypatch.setattr("ppo_fast.rlhf.planning.command.TINY", 0)
    assert cli.main(["train", *command[1:]]) == 2  # there are no weights
    assert "memory by phase, MiB" in capsys.readouterr().out
    assert cli.main(["train", *command[1:], "--log.no-console"]) == 2
    assert capsys.readouterr().out == ""


def test_what_the_run_itself_refuses_is_left_to_it(saved, tmp_path):
    seen = recording_console()
    for path in (None, str(tmp_path / "none")):
        announce(dataclasses.replace(saved, model=dataclasses.replace(saved.model, path=path)), seen)
    assert seen.export_text() == ""


def test_no_name_is_asked_for_when_the_prompts_are_missing(saved, monkeypatch):
    """Without a network the Hub takes most of a minute, and the run stops at the prompts at once."""
    monkeypatch.setattr("ppo_fast.rlhf.planning.command.read_shapes", lambda _: pytest.fail("a name was asked for"))
    for prompts in ("none.jsonl", "./none"):
        announce(dataclasses.replace(saved, data=dataclasses.replace(saved.data, prompts=prompts)), recording_console())


def test_a_plan_that_fails_stops_no_run(saved, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("odd\nmodel")

    monkeypatch.setattr("ppo_fast.rlhf.planning.command.make_plan", fail)
    monkeypatch.setattr("ppo_fast.rlhf.planning.command.TINY", 0)
    seen = recording_console()
    announce(saved, seen)
    assert seen.export_text() == "no plan of the memory: RuntimeError: odd model\n"
