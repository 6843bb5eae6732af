"""Models: positions, dropout, heads, and the shared forward pass."""

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers

from ppo_fast.rlhf.config.ppo import ModelConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.forward import response_logits, response_values
from ppo_fast.rlhf.models.loading import disable_dropout
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.models.pretrained import load_pretrained
from ppo_fast.rlhf.ppo.scoring import score
from ppo_fast.rlhf.training.checkpoint import save_models
from tests.helpers import raises_exactly
from tests.rlhf.factories import forward_pass

ARCHITECTURES = ["gpt2", "llama", "qwen2"]


def padded(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [1, 8], the same behind `count` padding tokens, and the mask of the latter."""
    ids = torch.arange(10, 18)[None]
    mask = torch.cat([torch.zeros(1, count, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)], dim=1)
    return ids, torch.cat([torch.zeros(1, count, dtype=torch.long), ids], dim=1), mask


@torch.no_grad()
def test_rule_01_positions_count_real_tokens_under_left_padding(make_models, make_config):
    # GPT-2 has learned absolute positions, which show the mistake that rotary ones hide.
    models = make_models(make_config(), arch="gpt2")
    ids, left_padded, mask = padded(5)
    truth = models.policy(ids).logits[0, -5:-1]
    assert (response_logits(models.policy, forward_pass(left_padded, mask, 4)) - truth).abs().max() < 1e-6
    wrong = models.policy(left_padded, attention_mask=mask.long()).logits[0, -5:-1]
    assert (wrong - truth).abs().max() > 1e-2
    values = response_values(models.value, forward_pass(ids, torch.ones_like(ids, dtype=torch.bool), 4))
    assert (response_values(models.value, forward_pass(left_padded, mask, 4)) - values).abs().max() < 1e-6


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rule_05_logits_and_values_are_those_before_each_response_token(make_models, make_config, arch):
    models = make_models(make_config(), arch=arch)
    _, left_padded, mask = padded(2)
    with torch.no_grad():
        inputs, sequences = {"attention_mask": mask.long()}, forward_pass(left_padded, mask, 3)
        if "position_ids" in inspect.signature(models.policy.forward).parameters:
            inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
        whole = models.policy(left_padded, **inputs).logits
        torch.testing.assert_close(response_logits(models.policy, sequences), whole[0, 6:9])
        values = models.value(left_padded, mask)
        torch.testing.assert_close(response_values(models.value, sequences), values[0, 6:9])


DROPOUT = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rule_04_dropout_is_off_even_in_train_mode(make_models, make_config, arch):
    config = make_config()
    ids, left_padded, mask = padded(2)
    noisy = tiny.make_model(64, arch=arch, hidden=32, layers=1, heads=2, **DROPOUT[arch]).train()
    # The check can see dropout: the model as made is not repeatable.
    sequences = forward_pass(ids, ids > 0, 4)
    assert not torch.equal(response_logits(noisy, sequences), response_logits(noisy, sequences))
    models = make_models(config, arch=arch, **DROPOUT[arch])
    assert not any(network.training for network in (models.policy, models.reference, models.value))
    for network in (models.policy, models.reference, models.value):
        network.train()
    for network in (models.policy, models.reference):
        first, second = (response_logits(network, forward_pass(left_padded, mask, 4)) for _ in range(2))
        assert torch.equal(first, second)
    assert torch.equal(models.value(left_padded, mask), models.value(left_padded, mask))


def test_rule_04_dropout_modules_and_attributes():
    module = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.MultiheadAttention(4, 2, dropout=0.3))
    disable_dropout(module)
    assert (module[0].p, module[1].dropout, module.training) == (0.0, 0.0, False)


def test_rule_14_a_new_head_is_normal_with_variance_1_over_d_plus_1(tokenizer):
    policy = tiny.make_model(64, hidden=512, layers=1, heads=2)
    models = load_models(ModelConfig(), torch.Generator().manual_seed(0), policy=policy, tokenizer=tokenizer)
    weight = models.value.head.weight
    assert weight.std().item() * 513**0.5 == pytest.approx(1, abs=0.15)
    assert abs(weight.mean().item()) < 3 * 512**-0.5 * 513**-0.5
    assert models.value.head.bias.item() == 0


def test_rule_14_a_zero_head_values_everything_0(make_models, make_config):
    models = make_models(make_config(model={"value_head": "zero"}))
    _, ids, mask = padded(2)
    assert torch.equal(models.value(ids, mask), torch.zeros(1, 10))


def test_rule_14_the_critic_starts_from_a_reward_model(make_models, make_config, tmp_path):
    torch.manual_seed(0)
    llama = tiny.make_model(64, hidden=32, layers=1, heads=2).config
    llama.num_labels = 1
    reward_model = transformers.LlamaForSequenceClassification(llama).eval()
    reward_model.save_pretrained(tmp_path / "rm")
    models = make_models(make_config(model={"value_path": str(tmp_path / "rm")}))
    ids = torch.arange(10, 18)[None]
    with torch.no_grad():
        values = models.value(ids, torch.ones_like(ids, dtype=torch.bool))
        torch.testing.assert_close(values[:, -1:], reward_model(ids).logits)


def test_the_value_model_may_start_from_another_causal_model(make_models, make_config, tmp_path):
    tiny.make_model(64, hidden=32, layers=1, heads=2, seed=5).save_pretrained(tmp_path / "other")
    models = make_models(make_config(model={"value_path": str(tmp_path / "other")}))
    other = transformers.AutoModel.from_pretrained(tmp_path / "other", dtype=torch.float32)
    for ours, theirs in zip(models.value.backbone.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_value_model_may_start_from_that_of_another_run(make_models, make_config, tmp_path, arch):
    first = make_models(make_config(seed=1), arch=arch)
    with torch.no_grad():
        for parameter in first.value.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    save_models(first, tmp_path / "final")
    second = make_models(make_config(model={"value_path": str(tmp_path / "final")}), arch=arch)
    ours, theirs = second.value.state_dict(), first.value.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(parameter.requires_grad for parameter in second.value.parameters())
    _, ids, mask = padded(2)
    assert torch.equal(second.value(ids, mask), first.value(ids, mask))


def test_a_value_model_that_knows_too_few_tokens_is_refused(make_models, make_config, tmp_path):
    tiny.make_model(63, hidden=32, layers=1, heads=2).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"model\.value_path: expected a model of at least 64 tokens, .* got 63"):
        make_models(make_config(model={"value_path": str(tmp_path / "small")}))


def test_the_reference_is_a_frozen_copy(make_models, make_config):
    models = make_models(make_config())
    for mine, frozen in zip(models.policy.parameters(), models.reference.parameters(), strict=True):
        assert torch.equal(mine, frozen)
        assert mine.data_ptr() != frozen.data_ptr()
        assert mine.requires_grad
        assert not frozen.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_the_configured_one(make_models, make_config, tmp_path, tokenizer, dtype):
    tiny.make_model(64, hidden=32, layers=1, heads=2).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    models = load_models(ModelConfig(path=str(tmp_path / "m"), dtype=dtype), torch.Generator())
    assert models.policy.dtype == models.value.backbone.dtype == getattr(torch, dtype)
    _, ids, mask = padded(2)
    assert models.value(ids, mask).dtype == torch.float32


def test_models_that_cannot_be_used(make_models, make_config, tmp_path, tokenizer):
    generator = torch.Generator()
    with pytest.raises(UserError, match=r"model\.path: expected a model directory or hub id, got null"):
        load_models(ModelConfig(), generator)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"AutoConfig: cannot load directory '.*empty': "):
        load_models(ModelConfig(path=str(tmp_path / "empty")), generator)
    tiny.make_model(64, hidden=32, layers=1, heads=2).save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"AutoModelForCausalLM: cannot load directory '.*cut': "):
        load_models(ModelConfig(path=str(tmp_path / "cut")), generator, tokenizer=tokenizer)
    headless = tiny.make_tokenizer(["w1"])
    headless.eos_token = None
    with pytest.raises(UserError, match=r"tokenizer: expected an EOS token, got none"):
        make_models(make_config(), tokenizer=headless)
    llama = tiny.make_model(64, hidden=32, layers=1, heads=2).config
    llama.num_labels = 2
    transformers.LlamaForSequenceClassification(llama).save_pretrained(tmp_path / "two")
    with pytest.raises(UserError, match=r"model\.value_path: expected a linear head 'score' with one output, got"):
        make_models(make_config(model={"value_path": str(tmp_path / "two")}))


def test_a_name_that_is_neither_a_directory_nor_on_the_hub_says_where_it_was_looked_for(monkeypatch):
    def from_pretrained(path, **_):
        raise OSError("no connection\nmore")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    here = f"no such directory 'runs-sft' in {Path.cwd()}, and no model of the Hub can be loaded by that name"
    with raises_exactly(f"AutoConfig: {here}: no connection", UserError):
        load_pretrained(transformers.AutoConfig, "runs-sft")


@pytest.fixture
def remote_code(tmp_path, tokenizer, monkeypatch):
    """A model directory whose own code leaves a file behind when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    directory, ran = tmp_path / "model", tmp_path / "ran"
    tiny.make_model(64, hidden=32, layers=1, heads=2).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(ran)!r}, 'w').close()\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return directory, ran


def test_code_of_a_model_runs_only_when_trusted(make_config, remote_code):
    directory, ran = remote_code
    with pytest.raises(UserError, match=r"cannot load directory .* only when model\.trust_remote_code is true$"):
        load_models(make_config(model={"path": str(directory)}).model, torch.Generator())
    assert not ran.exists()
    trusted = make_config(model={"path": str(directory), "trust_remote_code": True}).model
    assert type(load_models(trusted, torch.Generator()).policy).__name__ == "Model"
    assert ran.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_tokenizer_and_model_are_told_the_same_trust(make_config, tokenizer, tmp_path, monkeypatch, trust):
    tiny.make_model(64, hidden=32, layers=1, heads=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    seen = []
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        real = loader.from_pretrained

        def spy(path, real=real, **options):
            seen.append(options["trust_remote_code"])
            return real(path, **options)

        monkeypatch.setattr(loader, "from_pretrained", spy)
    config = make_config(model={"path": str(tmp_path / "model")} | ({"trust_remote_code": True} if trust else {}))
    load_models(config.model, torch.Generator())
    assert seen == [trust, trust]


@pytest.mark.parametrize("logits", ["linear", "materialized"])
def test_scoring_and_update_leave_the_last_token_out(make_models, make_config, make_rollout, logits):
    """Nothing was drawn from its state."""
    config, widths = make_config(model={"fused_head": logits == "linear"}), []
    models = make_models(config)
    rollout = make_rollout(models, config)
    for network in (models.policy, models.reference, models.value.backbone):
        network.get_input_embeddings().register_forward_pre_hook(lambda _, ids: widths.append(ids[0].shape[1]))
    score(models, rollout.generation, config.rollout)
    assert widths == [rollout.generation.input_ids.shape[1] - 1] * 3


def test_a_reward_model_is_no_policy(tmp_path, tokenizer):
    shape = tiny.make_model(64, hidden=32, layers=1, heads=2).config
    transformers.LlamaForSequenceClassification(shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    told = f"model.path: expected a causal LM, got a LlamaForSequenceClassification in {str(tmp_path)!r}"
    with raises_exactly(told, UserError):
        load_models(ModelConfig(path=str(tmp_path)), torch.Generator())
