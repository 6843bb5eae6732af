"""The command line: one config from preset, file and flags; mistakes are one line and exit status 2."""

import builtins
import json
import logging
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transformers
from transformers import AutoModelForCausalLM

from ppo_fast import __version__, cli, rlhf
from ppo_fast.rlhf import arguments
from ppo_fast.rlhf.config.files import load_config
from ppo_fast.rlhf.errors import UserError, install_command
from ppo_fast.rlhf.models import tiny
from tests.helpers import raises_exactly


@pytest.fixture
def files(tmp_path, tokenizer, monkeypatch):
    """A model, prompts, a reward and a config file in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny.make_model(64, hidden=32, layers=1, heads=2).save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"w{i}", "level": i}) + "\n" for i in range(8)))
    (tmp_path / "r.py").write_text("def f(completion_ids, level, **_):\n    return [float(x) for x in level]\n")
    (tmp_path / "run.yaml").write_text(
        "updates: 5\nmodel: {path: model}\ndata: {prompts: p.jsonl}\nreward: {function: r.py:f}\n"
        "rollout: {batch_size: 8, max_new_tokens: 4}\noptim: {minibatch_size: 4, lr: 1e-3}\n"
        "log: {console: false, tensorboard: false}\n"
    )
    return tmp_path


def test_train_runs_from_a_file_and_flags_win(files, capsys):
    capsys.readouterr()
    assert cli.main(["train", "--config", "run.yaml", "--updates", "1", "--out", "out", "--optim.lr=1e-4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("model: out/final\n")
    assert printed.err == ""  # no progress bar of another package
    AutoModelForCausalLM.from_pretrained("out/final")
    resolved = load_config("out/config.yaml")
    assert (resolved.updates, resolved.optim.lr, resolved.optim.minibatch_size) == (1, 1e-4, 4)


SUPERVISED = {
    "sft": ("AutoModelForCausalLM", []),
    "reward": ("AutoModelForSequenceClassification", ["reward_stats.json"]),
    "dpo": ("AutoModelForCausalLM", []),
    "value": ("AutoModelForSequenceClassification", ["value_stats.json"]),
}


@pytest.mark.parametrize("command", SUPERVISED)
def test_the_other_stages_run_from_a_file_and_flags(files, capsys, command):
    loader, extra = SUPERVISED[command]
    row = {"prompt": "w1", "completion": " w2", "chosen": " w2", "rejected": " w3", "score": 1.0}
    (files / "rows.jsonl").write_text((json.dumps(row) + "\n") * 20)
    (files / "stage.toml").write_text("[optim]\nlr = 1e-3\nepochs = 3\n[log]\nconsole = false\ntensorboard = false\n")
    flags = ["--config", "stage.toml", "--model", "model", "--data", "rows.jsonl", "--optim.epochs", "1"]
    capsys.readouterr()
    assert cli.main([command, *flags, "--out", "out"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("model: out/final\n", "")
    getattr(transformers, loader).from_pretrained("out/final")
    transformers.AutoTokenizer.from_pretrained("out/final")
    assert all((files / "out" / "final" / name).is_file() for name in extra)
    lines = (files / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]  # 18 rows of 20 in batches of 16
    if command == "reward":
        assert cli.main([command, *flags, "--out", "again", "--init", "out/final"]) == 0
    assert cli.main([command, *flags, "--out", "out"]) == 2
    assert "already holds 'metrics.jsonl'" in capsys.readouterr().err


def test_flags_over_file_over_preset_over_defaults(files):
    config = arguments.parse("train", ["--preset", "tiny-cpu", "--config", "run.yaml", "--optim.epochs", "7"])
    assert config.optim.epochs == 7
    assert config.optim.lr == 1e-3
    assert config.optim.value_lr == 1e-3
    assert config.rollout.batch_size == 8
    assert config.optim.betas == (0.9, 0.95)


def test_short_flags():
    config = arguments.parse("train", ["--model", "m", "--prompts=p.jsonl", "--reward", "a/b.py:f", "--out", "o"])
    assert (config.model.path, config.data.prompts, config.reward.function, config.output_dir) == (
        "m",
        "p.jsonl",
        "a/b.py:f",
        "o",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trane"],
            "no command 'trane'; "
            "the commands are sft, reward, value, train, dpo, plan, export, quickstart, plot, report, doctor",
        ),
        (["sft", "--prompts", "p.jsonl"], "no option '--prompts'; here it is '--data.train'"),
        (["sft", "--preset", "tiny-cpu"], "no option '--preset'"),
        (["sft", "--learning-rate", "1e-5"], "no option '--learning-rate'; here it is '--optim.lr'"),
        (["dpo", "--optim.lrr", "1"], "no option '--optim.lrr', the nearest is '--optim.lr'"),
        (["reward", "--data", "none.jsonl", "--model", "model"], "data.train: no such file 'none.jsonl' in {here}"),
        (["dpo", "--beta", "-1"], "flags: beta: expected a number > 0, got -1.0"),
        (["train", "--config", "none.yaml"], "config: no such file 'none.yaml' in {here}"),
        (
            ["train", "--config", "run.yaml", "--output-dir", "o", "--reward", "r.py:g"],
            "reward.function: no function 'g' in 'r.py'",
        ),
        (["train", "run.yaml"], "expected an option, got 'run.yaml'"),
        (["train", "--config"], "--config: expected a value, got none"),
        (["train", "--updates"], "--updates: expected a value, got none"),
        (["train", "--resume="], "--resume: expected no value or the name of a checkpoint, got an empty one"),
        (["train", "--log.no-console", "3"], "--log.no-console: expected no value, got '3'"),
        (["train", "--updates", "5", "-x"], "expected an option, got '-x'"),
        (["train", "--reward.models"], "--reward.models: expected a value, got none"),
        (["train", "--no-output-dir"], "no option '--no-output-dir', the nearest is '--output-dir'"),
        (["train", "--optim.lrr=3"], "no option '--optim.lrr', the nearest is '--optim.lr'"),
        (
            ["train", "--max-gradnorm", "1"],
            "no option '--max-gradnorm', the nearest is '--optim.max-grad-norm'",
        ),
        (
            ["train", "--optim.lr", "fast"],
            "flags: optim.lr: expected a number, got 'fast'",
        ),
        (
            ["train", "--kl.placement", "los"],
            "flags: kl.placement: expected 'reward', 'loss' or 'both', got 'los'",
        ),
        (
            ["train", "--seed", "1", "2"],
            "--seed: expected one value, got '1 2'",
        ),
        (
            ["train", "--config", "run.yaml", "--optim.minibatch-size", "24"],
            "run.yaml and flags: optim.minibatch_size: expected a divisor of rollout.batch_size = 8, got 24",
        ),
        (
            ["train", "--model.layout", "adapters"],
            "flags: model.lora.rank: expected a rank > 0 with model.layout 'adapters', got 0",
        ),
        (
            ["train", "--model.lora.rank", "8"],
            "flags: model.layout: expected 'adapters' with model.lora.rank, got 'separate'",
        ),
        (["sft", "--merge"], "flags: model.lora.merge: expected false without lora.rank, got True"),
        (
            ["dpo", "--model.lora.targets", "q_proj"],
            "flags: model.lora.targets: expected none without lora.rank, got ('q_proj',)",
        ),
        (
            ["sft", "--model", "no/such/dir", "--data", "p.jsonl"],
            "model.path: no such directory 'no/such/dir' in {here}",
        ),
        (
            ["train", "--rollout.temperature", "-1"],
            "flags: rollout.temperature: expected 1e-9 <= temperature <= 1e9, got -1.0",
        ),
    ],
)
def test_mistakes_are_one_line_and_status_2(files, capsys, arguments, message):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"ppo-fast: {message.replace('{here}', str(files))}\n"


def test_flags_say_every_kind_of_value():
    flags = "--log.no-console --overwrite --log.tensorboard False --threads None --optim.betas 0.5 0.75"
    more = ["--loss.clip-high=null", "--updates", "7", "--optim.weight_decay=1e-2"]
    config = arguments.parse("train", [*flags.split(), *more])
    assert (config.log.console, config.overwrite, config.log.tensorboard) == (False, True, False)
    assert (config.threads, config.optim.betas, config.loss.clip_high) == (None, (0.5, 0.75), None)
    assert (config.updates, config.optim.weight_decay) == (7, 0.01)
    assert arguments.parse("train", ["--reward.models", "a"]).reward.models == ("a",)
    assert arguments.parse("train", ["--reward.models", "a", "b"]).reward.models == ("a", "b")
    assert arguments.parse("train", ["--reward.models", "null"]).reward.models == ()


def test_a_value_may_look_like_a_flag():
    config = arguments.parse("train", ["--model=--odd", "--kl.coef", "1e-3", "--reward.rejected-score", "-.5"])
    assert (config.model.path, config.kl.coef, config.reward.rejected_score) == ("--odd", 1e-3, -0.5)


def test_file_and_flags_are_checked_together(files):
    (files / "run.yaml").write_text("model: {layout: adapters}")
    message = "run.yaml: model.lora.rank: expected a rank > 0 with model.layout 'adapters', got 0"
    with raises_exactly(message, UserError):
        arguments.parse("train", ["--config", "run.yaml"])
    config = arguments.parse("train", ["--config", "run.yaml", "--model.lora.rank", "8"])
    assert (config.model.layout, config.model.lora.rank) == ("adapters", 8)


@pytest.mark.parametrize(
    ("flags", "resume"), [([], False), (["--resume"], True), (["--resume", "update-000003"], "update-000003")]
)
def test_the_run_gets_what_to_resume(monkeypatch, flags, resume):
    saved = SimpleNamespace(state={"config": {"seed": 3}})
    monkeypatch.setattr("ppo_fast.rlhf.training.checkpoint.load_checkpoint", lambda *_, **__: saved)
    calls = []
    run = lambda config, **options: calls.append((config, options)) or SimpleNamespace(model="m")  # noqa: E731
    monkeypatch.setattr(rlhf, "train_sft", run)
    assert cli.main(["sft", "--seed", "5", *flags]) == 0
    assert calls == [(rlhf.SFTConfig(seed=5), {"resume": resume})]


def test_an_error_inside_the_run_is_one_line_without_a_traceback(files, capsys):
    (files / "r.py").write_text("def f(**_):\n    return 1 / 0\n")
    assert cli.main(["train", "--config", "run.yaml"]) == 2
    told = capsys.readouterr().err
    last = "ppo-fast: update 1: the reward function 'f' failed with ZeroDivisionError: division by zero (r.py:2)"
    assert told.splitlines()[-1] == last
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def f(:\n", "SyntaxError: invalid syntax (r.py, line 1)"),
        ("import json\njson.loads('{')\n", "JSONDecodeError: {reason} (r.py:2)"),
        ("raise SystemExit('usage')\n", "SystemExit: usage (r.py:1)"),
    ],
)
def test_a_reward_file_that_fails_is_told_in_one_sentence(files, capsys, source, told):
    (files / "r.py").write_text(source)
    reason = "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    assert cli.main(["train", "--config", "run.yaml"]) == 2
    expected = f"ppo-fast: reward.function: 'r.py' does not import: {told.format(reason=reason)}\n"
    assert capsys.readouterr().err == expected


def test_a_fault_of_our_own_keeps_its_traceback(files, monkeypatch):
    monkeypatch.setattr("ppo_fast.rlhf.ppo.train.collect", lambda *_: {}["x"])
    with pytest.raises(KeyError):
        cli.main(["train", "--config", "run.yaml"])


def test_a_missing_dependency_names_the_install_command(files, monkeypatch, capsys):
    real = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    monkeypatch.setitem(cli.COMMANDS, "quickstart", lambda argv: __import__("matplotlib.pyplot"))
    assert cli.main(["quickstart"]) == 2
    expected = f"ppo-fast: quickstart needs matplotlib, which is not installed: {install_command()}\n"
    assert capsys.readouterr().err == expected


@pytest.mark.filterwarnings("default::UserWarning")
def test_warnings_are_one_line(files, capsys):
    (files / "p.jsonl").write_text('{"prompt": "w1 w2 w3", "level": 1}\n{"prompt": "w1", "level": 2}\n')
    assert cli.main(["train", "--config", "run.yaml", "--updates", "1", "--data.max-prompt-tokens", "2"]) == 0
    expected = "warning: dropped 1 of 2 prompts longer than data.max_prompt_tokens = 2\n"
    assert expected in capsys.readouterr().err


def test_advice_of_bitsandbytes_at_its_import_is_not_shown(capsys):
    cli.main(["sft", "--optim.lrr", "1"])
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
    assert logging.getLogger("bitsandbytes.cextension").isEnabledFor(logging.WARNING)


def test_help_and_version(capsys):
    assert cli.main([]) == cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command} " in text
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ppo-fast {__version__}\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--optim.lr FLOAT" in text
    assert "--config FILE" in text
    assert re.search(r"--preset NAME \(0.5b-24g, 7b-24g, 7b-80g-full,\s+7b-80g-lora, tiny-cpu\)", text)


WITHOUT_TRANSFORMERS = """
import sys
for name in ("transformers", "peft", "datasets"):
    sys.modules[name] = None
from ppo_fast import cli
try:
    cli.main(["sft", "--help"])
except SystemExit as stop:
    assert stop.code == 0
sys.exit(cli.main(["sft", "--model", "base", "--data", "examples.jsonl"]))
"""


def test_help_needs_no_transformers_and_a_run_names_the_extra():
    ran = subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.splitlines()[-1:]) == (
        2,
        [f"ppo-fast: sft needs transformers, which is not installed: {install_command()}"],
    ), ran.stderr
    assert "--model.path" in ran.stdout


def test_doctor_and_quickstart_are_reached(monkeypatch, capsys):
    assert cli.main(["doctor", "--json"]) == 0
    assert "versions" in json.loads(capsys.readouterr().out)
    with pytest.raises(SystemExit) as stop:
        cli.main(["quickstart", "--help"])
    assert stop.value.code == 0
    assert "ppo-fast quickstart" in capsys.readouterr().out


INTERRUPTED = """
import os, signal, sys, types
class Slow(types.ModuleType):  # a package that gets Ctrl-C while it is imported, and turns it into an error of its own
    def __getattr__(self, name):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError from None
sys.modules["{module}"] = Slow("{module}")
from ppo_fast import cli
cli.main({argv})
"""


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("ppo_fast.rlhf.training.signals", ["train"]),
        ("ppo_fast.rlhf.ppo.train", ["train", "--log.no-console"]),
        ("ppo_fast.rlhf.reports.plots", ["plot"]),
    ],
)
def test_an_interrupted_import_ends_the_command_without_a_traceback(module, argv):
    code = INTERRUPTED.format(module=module, argv=argv)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (-signal.SIGINT, "", "")


def test_an_interrupt_ends_quietly(monkeypatch):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", interrupt)
    assert cli.main(["train"]) == 130
