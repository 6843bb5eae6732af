"""A checkpoint or a model that is damaged, or is not what is expected, is one sentence, and no file is touched."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppo_fast.rlhf import UserError, train_ppo
from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.data.prompts import load_prompts
from ppo_fast.rlhf.integrity import read_sealed, write_sealed
from ppo_fast.rlhf.models.adapter_files import ADAPTER_FILE
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.models.saved import VALUE_DIRECTORY, VALUE_FILE
from ppo_fast.rlhf.ppo.log import RunLog
from ppo_fast.rlhf.ppo.reward_sources import load_sources
from ppo_fast.rlhf.ppo.rewards import Scorer
from ppo_fast.rlhf.ppo.train import PPORun
from ppo_fast.rlhf.training.checkpoint import (
    STATE,
    STATE_TENSORS,
    latest,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_models,
    write_models,
)
from ppo_fast.rlhf.training.resume import load_start
from ppo_fast.rlhf.training.signals import StopSignals
from tests.helpers import raises_exactly
from tests.rlhf.conftest import PROMPTS
from tests.rlhf.layout_factories import models_in, read_adapter, save_base
from tests.rlhf.supervised_factories import make_model, make_tokenizer

NEWEST = "update-000002"


def bytes_below(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def reward(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A PPO run of two updates, each saved, that ended: `run`, `config`, `directory`, `newest` and its `files`."""
    directory = tmp_path_factory.mktemp("damage") / "run"
    config = config_from_dict(
        {
            "updates": 2,
            "threads": 1,
            "rollout": {"batch_size": 4, "max_new_tokens": 4},
            "optim": {"minibatch_size": 4, "epochs": 1},
            "kl": {"adaptive": True},
            "reference": {"update": "ema", "every": 1, "decay": 0.5},
            "output_dir": str(directory),
            "checkpoint": {"every": 1},
            "log": {"tensorboard": False, "console": False},
        }
    )
    generator = torch.Generator().manual_seed(0)
    models = load_models(config.model, generator, policy=make_model(), tokenizer=make_tokenizer())
    data = load_prompts(PROMPTS, models.tokenizer, config.data)
    run = PPORun(config, models, data, Scorer(load_sources(config, models, reward), config.reward), None, generator)
    with RunLog(config) as log, StopSignals("update") as stop:
        run.loop(log, stop)
    newest = directory / "checkpoints" / NEWEST
    return SimpleNamespace(run=run, config=config, directory=directory, newest=newest, files=bytes_below(newest))


@pytest.fixture
def whole(ended):
    """`ended`, with the files of its newest checkpoint put back afterwards."""
    yield ended
    for path, content in ended.files.items():
        path.write_bytes(content)


def restore(ended):
    ended.run.restore(load_start(ended.config, True, "updates", "log"))


def damages(content):
    """What may happen to the bytes of a file; None: they are gone."""
    middle = len(content) // 2
    flipped = (bytes([*content[:at], content[at] ^ 1, *content[at + 1 :]]) for at in (0, middle, len(content) - 1))
    return [None, b"", content[:middle], content[:-1], content + b" ", *flipped]


def sentence(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_every_damage_to_every_file_is_one_sentence_and_touches_nothing(whole):
    tried = 0
    for path, content in whole.files.items():
        for damaged in damages(content):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            if path.name == STATE and (damaged is None or damaged == content + b" "):
                continue  # without it there is no checkpoint; white space at its end is no damage
            before = bytes_below(whole.directory)
            with pytest.raises(UserError) as error:
                restore(whole)
            good = "--resume update-000001 continues from the one before"
            assert sentence(error).startswith(f"resume: {str(whole.newest)!r} is damaged: {path.name} ")
            assert sentence(error).endswith(f"; {good}")
            assert bytes_below(whole.directory) == before
            tried += 1
        path.write_bytes(content)
    assert {path.name for path in whole.files} >= {"model.safetensors", VALUE_FILE, STATE, STATE_TENSORS, "config.json"}
    assert tried > 40
    restore(whole)


def flat_indices(value, depth, path=()):
    """The paths of all keys of nested dicts down to a depth."""
    for key, item in value.items() if depth and isinstance(value, dict) else ():
        yield (*path, key)
        yield from flat_indices(item, depth - 1, (*path, key))


def changed(value, path, change):
    """Nested dicts, of which those on `path` are copies in whose last one `change(holder, key)` was done."""
    copy = dict(value)
    if path[1:]:
        copy[path[0]] = changed(value[path[0]], path[1:], change)
    else:
        change(copy, path[0])
    return copy


def wrong_type(holder, key):
    holder[key] = "text" if not isinstance(holder[key], str) else {"a": [None]}


def remove(holder, key):
    del holder[key]


@pytest.mark.parametrize("change", [wrong_type, remove])
def test_every_key_of_the_state_that_is_changed_is_noticed(whole, change):
    path = whole.newest / STATE
    content = json.loads(path.read_text())
    every = [*flat_indices(content, 3)]
    assert len(every) > 40
    for place in every:
        path.write_text(json.dumps(changed(content, place, change)))
        with pytest.raises(UserError, match=r"^resume: .* is damaged: state\.json "):
            load_checkpoint(whole.newest.parent, tensors=False)


@pytest.mark.parametrize("change", [wrong_type, remove])
def test_a_state_of_other_keys_or_types_is_one_sentence(whole, change, monkeypatch):
    """Sealed as by another version: its digests are right."""
    monkeypatch.setattr(PPORun, "_load", lambda self, directory: None)  # the weights are as they were
    path, told = whole.newest / STATE, {}
    state, _ = read_sealed(path)
    before = {path: content for path, content in bytes_below(whole.directory).items() if path.name != STATE}
    for place in flat_indices(state | {"config": "config"}, 3):
        write_sealed(changed(state, place, change), path)
        try:
            if place[0] in ("config", "log"):  # a config takes 0.1 s to check
                restore(whole)
            else:
                whole.run.restore(load_checkpoint(whole.newest.parent))
        except UserError as error:
            told[place] = str(error)
    kept = {path: content for path, content in bytes_below(whole.directory).items() if path.name != STATE}
    assert kept == before
    assert not any("\n" in message for message in told.values())
    assert told.keys() >= {(name,) for name in ("config", "log", "inputs", "parts", "rng")}
    assert told.keys() >= {("rng", name) for name in state["rng"] if name != "cuda"}
    assert told.keys() >= {("parts", name) for name in state["parts"]}


def edit(path, change):
    """Have `change` edit the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


MLP = "layers.0.mlp.up_proj.weight"
POLICY, VALUE = f"model.{MLP}", f"backbone.{MLP}"
MOMENTS = "state.parts.learner.policy.state.0.exp_avg"
EDITS = {
    "missing": lambda name: lambda tensors: tensors.pop(name),
    "renamed": lambda name: lambda tensors: tensors.update({"other": tensors.pop(name)}),
    "unexpected": lambda name: lambda tensors: tensors.update({"other": torch.ones(2)}),
    "shape": lambda name: lambda tensors: tensors.update({name: tensors[name][:3].contiguous()}),
    "dtype": lambda name: lambda tensors: tensors.update({name: tensors[name].bfloat16()}),
}


@pytest.mark.parametrize(
    ("file", "name", "kind", "message"),
    [
        ("model.safetensors", POLICY, "missing", f"LlamaForCausalLM: cannot load {{0!r}}: it has no tensor {POLICY!r}"),
        ("model.safetensors", POLICY, "renamed", f"LlamaForCausalLM: cannot load {{0!r}}: it has no tensor {POLICY!r}"),
        (
            "model.safetensors",
            POLICY,
            "unexpected",
            "LlamaForCausalLM: cannot load {0!r}: it has an unexpected tensor 'other'",
        ),
        (
            "model.safetensors",
            POLICY,
            "shape",
            f"{{1}}: expected {POLICY!r} to be [128, 32] float32, got [3, 32] float32",
        ),
        (
            "model.safetensors",
            POLICY,
            "dtype",
            f"{{1}}: expected {POLICY!r} to be [128, 32] float32, got [128, 32] bfloat16",
        ),
        (VALUE_FILE, VALUE, "missing", f"{{1}}: expected a tensor {VALUE!r}, got none"),
        (VALUE_FILE, VALUE, "renamed", f"{{1}}: expected a tensor {VALUE!r}, got none"),
        (VALUE_FILE, VALUE, "unexpected", "{1}: expected no tensor 'other', got one"),
        (VALUE_FILE, VALUE, "dtype", f"{{1}}: expected {VALUE!r} to be [128, 32] float32, got [128, 32] bfloat16"),
        (
            STATE_TENSORS,
            MOMENTS,
            "shape",
            "resume: optimizer state 0: expected 'exp_avg' to be [64, 32] float32, got [3, 32] float32",
        ),
        (
            STATE_TENSORS,
            MOMENTS,
            "dtype",
            "resume: optimizer state 0: expected 'exp_avg' to be [64, 32] float32, got [64, 32] bfloat16",
        ),
        (
            STATE_TENSORS,
            "state.parts.reference.weights.0",
            "shape",
            "resume: reference: expected '0' to be [64, 32] float32, got [3, 32] float32",
        ),
        (STATE_TENSORS, MOMENTS, "missing", f"resume: {{0!r}} is damaged: {MOMENTS!r}; --resume update-000001"),
        (STATE_TENSORS, "state.rng.torch", "shape", "resume: cannot restore {0!r}: "),
    ],
)
def test_another_tensor_than_the_runs_own_is_one_sentence(whole, file, name, kind, message):
    """Sealed with right digests: what is loaded is checked besides."""
    path = whole.newest / file
    state, _ = read_sealed(whole.newest / STATE)
    edit(path, EDITS[kind](name))
    write_sealed(state, whole.newest / STATE)
    with pytest.raises(UserError) as error:
        restore(whole)
    assert sentence(error).startswith(message.format(str(whole.newest), str(path)))


def test_a_run_with_adapters_takes_no_other_tensors_either(tmp_path):
    base = save_base(tmp_path / "base")
    models = models_in("adapters", base)
    saved = tmp_path / "saved"
    saved.mkdir()
    write_models(models, saved)
    load_weights(models, saved)
    name = "base_model.model.score.weight"
    edit(saved / VALUE_DIRECTORY / ADAPTER_FILE, EDITS["missing"](name))
    path = str(saved / VALUE_DIRECTORY / ADAPTER_FILE)
    with raises_exactly(f"{path}: expected a tensor {name!r}, got none", UserError):
        load_weights(models, saved)
    edit(saved / VALUE_DIRECTORY / ADAPTER_FILE, EDITS["missing"]("base_model.model.score.bias"))
    field = "model.value_path"
    directory = str(saved / VALUE_DIRECTORY)
    with raises_exactly(f"{field}: expected the head 'score' of the adapter, got {directory!r}", UserError):
        read_adapter(field, directory)
    path = saved / ADAPTER_FILE
    first = next(iter(load_file(path)))
    edit(path, EDITS["dtype"](first))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: expected .* float32, got \[.*\] bfloat16$"):
        load_weights(models, saved)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("missing", "no tensor '{}'"),
        ("renamed", "no tensor '{}'"),
        ("shape", "another shape of '{}'"),
    ],
)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_model_with_a_random_weight_is_refused(tmp_path, kind, problem, arch):
    path = save_base(tmp_path / "base", arch)
    name = next(name for name in load_file(f"{path}/model.safetensors") if ".mlp." in name)
    edit(f"{path}/model.safetensors", EDITS[kind](name))
    message = f"AutoModelForCausalLM: cannot load {path!r}: it has {problem.format(name)}"
    with raises_exactly(message, UserError):
        models_in("separate", path)
    with pytest.raises(UserError, match=r"^AutoModel: cannot load '.*base': it has "):
        models_in("separate", value_path=path)


def test_a_saved_value_model_without_a_tensor_is_refused(tmp_path):
    final = save_models(models_in("separate"), tmp_path / "final")
    edit(final / VALUE_FILE, EDITS["missing"](VALUE))
    message = f"{final / VALUE_FILE}: expected a tensor {VALUE!r}, got none"
    with raises_exactly(message, UserError):
        models_in("separate", value_path=str(final))
    (final / VALUE_FILE).write_bytes(b"cut")
    with pytest.raises(UserError, match=r"^cannot read '.*value_model\.safetensors': "):
        models_in("separate", value_path=str(final))


def test_a_missing_head_is_refused_and_a_new_one_is_not(tmp_path):
    path = save_base(tmp_path / "base")
    edit(f"{path}/model.safetensors", EDITS["missing"]("lm_head.weight"))
    told = f"AutoModelForCausalLM: cannot load {path!r}: it has no tensor 'lm_head.weight'"
    with raises_exactly(told, UserError):
        models_in("separate", path)
    models_in("separate", value_path=path)  # a value model's head is new
    edit(f"{path}/model.safetensors", EDITS["missing"](POLICY))
    with raises_exactly(f"{told} and 1 more", UserError):
        models_in("separate", path)


def save(target, keep_last=0):
    return save_checkpoint(target, lambda directory: (directory / "file").write_text("x"), {}, keep_last=keep_last)


def test_what_is_not_complete_is_no_checkpoint(tmp_path):
    for number in (1, 2):
        save(tmp_path / f"step-{number}")
    (tmp_path / "step-99").mkdir()
    (tmp_path / "epoch-7").write_text("x")
    shutil.copytree(tmp_path / "step-2", tmp_path / "step-5")
    os.truncate(tmp_path / "step-5" / STATE, 20)
    assert latest(tmp_path) == tmp_path / "step-2"
    save(tmp_path / "step-3", keep_last=2)
    held = {path.name for path in tmp_path.iterdir()}
    assert held == {"step-2", "step-3", "step-5", "step-99", "epoch-7"}
    told = f"resume: {str(tmp_path / 'step-5')!r} is damaged: state.json is no JSON; --resume step-3 continues from the"
    with raises_exactly(f"{told} one before", UserError):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, "step-3").directory == tmp_path / "step-3"
    told = f"resume: expected one of step-2, step-3, step-5 in {str(tmp_path)!r}, got 'step-99'"
    with raises_exactly(told, UserError):
        load_checkpoint(tmp_path, "step-99")


def test_the_good_one_that_is_named_is_whole(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path / f"step-{number}")
    for number in (2, 3):
        (tmp_path / f"step-{number}" / "file").write_text("y")
    told = f"resume: {str(tmp_path / 'step-3')!r} is damaged: file is not as it was written"
    with raises_exactly(f"{told}; --resume step-1 continues from the one before", UserError):
        load_checkpoint(tmp_path)
    (tmp_path / "step-1" / "file").unlink()
    with raises_exactly(f"{told}; there is no good one before it", UserError):
        load_checkpoint(tmp_path)
    with raises_exactly(
        f"resume: {str(tmp_path / 'step-1')!r} is damaged: file is missing; there is no good one before it", UserError
    ):
        load_checkpoint(tmp_path, "step-1")


def test_a_checkpoint_without_digests_is_told(tmp_path):
    save(tmp_path / "step-1")
    (tmp_path / "step-1" / STATE).write_text("{}")
    told = "state.json has no digests: it is damaged, or another version of ppo_fast wrote it"
    with raises_exactly(
        f"resume: {str(tmp_path / 'step-1')!r} is damaged: {told}; there is no good one before it", UserError
    ):
        load_checkpoint(tmp_path)


def test_logs_are_on_the_disk_before_their_size_is_recorded(make_config, tmp_path, monkeypatch):
    flushed, fsync = {}, os.fsync

    def watched(descriptor):
        fsync(descriptor)
        flushed[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", watched)
    with RunLog(make_config(log={"print_every": 0})) as log:
        log.write(1, {"objective/kl": 0.5})
        log.write_answers(1, [{"prompt": "w1"}])
        position = log.position(1)
    assert position.pop("done") == 1
    assert position["metrics.jsonl"] > 0
    assert position["evaluations.jsonl"] > 0
    for name, size in position.items():
        assert flushed[(tmp_path / "run" / name).stat().st_ino] == size == (tmp_path / "run" / name).stat().st_size


def test_a_damaged_checkpoint_stops_a_run_before_anything_is_loaded(whole):
    (whole.newest / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is damaged: model\.safetensors is missing; --resume update-000001 continues"):
        train_ppo(whole.config, resume=True)
