"""What is at a path: each kind of directory, and each question asked once."""

import pytest
import torch
import transformers

from ppo_fast.rlhf.config.files import config_from_dict
from ppo_fast.rlhf.models.adapter_files import find_adapter
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.models.saved import VALUE_CONFIG, VALUE_FILE, SavedModel, find_models
from ppo_fast.rlhf.ppo.reward_sources import load_sources
from ppo_fast.rlhf.training.checkpoint import save_models
from tests.helpers import raises_exactly
from tests.rlhf.layout_factories import models_in, run_stage, save_base
from tests.rlhf.supervised_factories import make_model, make_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """base, its adapters sft and reward, and the final models of runs in two layouts."""
    root = tmp_path_factory.mktemp("saved")
    base = save_base(root / "base")
    run_stage("sft", root / "sft", base)
    run_stage("reward", root / "reward", base)
    for layout in ("separate", "adapters"):
        save_models(models_in(layout, base), root / layout)
    classifier = transformers.LlamaForSequenceClassification(make_model().config)
    classifier.save_pretrained(root / "classifier")
    return root


@pytest.mark.parametrize(
    ("name", "kind", "kind_of_value", "adapter"),
    [
        ("base", "causal", "causal", False),
        ("sft/final", "causal", "causal", True),
        ("reward/final", "classifier", "classifier", True),
        ("classifier", "classifier", "classifier", False),
        ("separate", "causal", "value", False),
        ("adapters", "causal", "classifier", True),
    ],
)
def test_every_directory_is_known_for_what_it_is(root, name, kind, kind_of_value, adapter):
    path = str(root / name)
    saved = SavedModel("init", path)
    assert (saved.kind, saved.value.kind, saved.adapter is not None) == (kind, kind_of_value, adapter)
    assert saved.base == (str(root / "base") if adapter else path)
    assert saved.value.base == saved.base
    assert saved.tokenizer == path
    assert (saved.adapter_on(str(root / "base")) is not None) == adapter
    assert saved.adapter_on(str(root)) is None
    assert saved.config.model_type == "llama"


def test_a_value_model_without_its_weights_is_no_other_model(root, tmp_path):
    """The policy next to it was taken for a value model."""
    path = save_models(models_in("separate"), tmp_path / "final")
    (path / VALUE_FILE).unlink()
    assert SavedModel(path=str(path)).value.kind == "value"
    with pytest.raises(ValueError, match=f"cannot read .*{VALUE_FILE}"):
        models_in("separate", value_path=str(path))
    (path / VALUE_CONFIG).unlink()
    assert SavedModel(path=str(path)).value.kind == "causal"


def test_each_path_is_asked_once(root, monkeypatch):
    asked = []

    def found(field, path):
        asked.append(path)
        return find_adapter(field, path)

    path = str(root / "reward/final")
    config = config_from_dict({"model": {"value_path": path}, "reward": {"models": [path, path]}})
    saved = find_models(config.model, config.reward.models)
    assert saved.value is saved.rewards[0] is saved.rewards[1]
    monkeypatch.setattr("ppo_fast.rlhf.models.saved.find_adapter", found)
    models = load_models(
        config.model, torch.Generator(), policy=make_model(), tokenizer=make_tokenizer(), reward=config.reward
    )
    assert len(load_sources(config, models)) == 2
    assert asked == [path]


def test_a_directory_without_a_config_is_refused(tmp_path):
    message = f"AutoConfig: cannot load directory {str(tmp_path)!r}: it has no config.json"
    with raises_exactly(message, ValueError):
        assert SavedModel(path=str(tmp_path)).kind
