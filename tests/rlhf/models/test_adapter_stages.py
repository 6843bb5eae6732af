"""SFT, reward models and DPO with adapters: what is trained, saved, merged, continued and resumed."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ppo_fast.rlhf import UserError, arguments
from ppo_fast.rlhf.config.model import LoraConfig
from ppo_fast.rlhf.models.adapter_files import ADAPTER_CONFIG, ADAPTER_FILE
from ppo_fast.rlhf.supervised.train import SupervisedRun
from ppo_fast.rlhf.training.checkpoint import save_models
from tests.helpers import raises_exactly
from tests.rlhf.layout_factories import IDS, LORA, every_bit, logits, models_in, read_adapter, run_stage, save_base
from tests.rlhf.supervised_factories import STAGES, make_tokenizer

LOADERS = {"sft": AutoModelForCausalLM, "dpo": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
PEFT = {
    "sft": peft.AutoPeftModelForCausalLM,
    "dpo": peft.AutoPeftModelForCausalLM,
    "reward": peft.AutoPeftModelForSequenceClassification,
}
ONE = {"sft": {}, "dpo": {}, "reward": {"num_labels": 1}}


@pytest.mark.parametrize(("stage", "arch"), [("sft", "llama"), ("reward", "gpt2"), ("dpo", "llama")])
def test_stages_train_adapters_alone_and_save_what_peft_loads(tmp_path, stage, arch):
    base = save_base(tmp_path / "base", arch)
    start = every_bit(AutoModelForCausalLM.from_pretrained(base))
    result = run_stage(stage, tmp_path / "run", base, optim={"epochs": 2})
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]
    others = {"reward_stats.json", "special_tokens_map.json", "README.md", "curves.png"}
    files = {path.name for path in result.model.iterdir()} - others
    ends = {"generation_config.json"} if stage == "reward" else set()  # the EOS ids at which it is read
    assert files == {ADAPTER_CONFIG, ADAPTER_FILE, "tokenizer.json", "tokenizer_config.json"} | ends
    own = {name.replace(".base_layer", ""): value for name, value in every_bit(result.trained).items()}
    kept = [name for name in own if name in start]
    assert len(kept) >= len(start) - 1  # the head aside
    if stage == "reward":
        assert result.trained.score.weight.requires_grad
        assert result.trained.score.weight.dtype == torch.float32
    assert all(torch.equal(own[name], start[name]) for name in kept)
    loaded = PEFT[stage].from_pretrained(result.model, **ONE[stage])
    assert torch.equal(logits(loaded), logits(result.trained))
    assert AutoTokenizer.from_pretrained(result.model).get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("stage", STAGES)
def test_float32_adapters_on_bfloat16_weights_lose_no_step(tmp_path, base, stage, recwarn):
    result = run_stage(stage, tmp_path / "run", base, dtype="bfloat16", optim={"epochs": 2})
    assert result.history[-1]["train/loss"] < result.history[0]["train/loss"]
    trained = [parameter for parameter in result.trained.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert not [warning for warning in recwarn if "bfloat16" in str(warning.message)]


def test_transformers_loads_the_adapter_of_a_causal_model(tmp_path, base):
    result = run_stage("sft", tmp_path / "run", base)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(result.model)), logits(result.trained))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("stage", STAGES)
def test_merged_is_an_ordinary_model(tmp_path, stage, arch):
    base = save_base(tmp_path / "base", arch)
    result = run_stage(stage, tmp_path / "run", base, lora=LORA["lora"] | {"merge": True})
    assert not (result.model / ADAPTER_CONFIG).exists()
    assert {"config.json", "model.safetensors"} <= {path.name for path in result.model.iterdir()}
    merged, loading = LOADERS[stage].from_pretrained(result.model, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(logits(merged), logits(result.trained), atol=1e-5, rtol=1e-5)
    assert any(".lora_A." in name for name in every_bit(result.trained))  # in memory they are apart


def test_full_training_goes_on_from_the_merged_adapter(tmp_path, base):
    first = run_stage("sft", tmp_path / "lora", base)
    models = models_in("separate", str(first.model))
    with torch.no_grad():
        torch.testing.assert_close(models.policy(IDS).logits, logits(first.trained), atol=1e-5, rtol=1e-5)
    assert all(parameter.requires_grad for parameter in models.policy.parameters())
    assert not any("lora" in name for name, _ in models.policy.named_parameters())
    saved = save_models(models, tmp_path / "final")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved)), logits(models.policy))


def test_sft_continues_its_adapter(tmp_path, base):
    first = run_stage("sft", tmp_path / "first", base)
    more = run_stage("sft", tmp_path / "more", str(first.model), optim={"lr": 1e-12})
    torch.testing.assert_close(logits(more.trained), logits(first.trained), atol=1e-4, rtol=0)
    assert json.loads((more.model / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == base


def test_an_adapter_finds_its_base_from_another_directory(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run_stage("sft", tmp_path / "first", "base")
    assert json.loads((first.model / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == base
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_stage("sft", tmp_path / "more", str(first.model))


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_adapter_of_a_reward_model_begins_no_language_model(tmp_path, base, stage):
    path = str(run_stage("reward", tmp_path / "reward", base).model)
    with raises_exactly(f"model.path: expected a causal LM, got the adapter of a scalar model in {path!r}", UserError):
        run_stage(stage, tmp_path / "more", path)


def test_dpo_begins_at_its_reference(tmp_path, base):
    """Also where the model begins with an adapter: its reference is not the base then."""
    sft = run_stage("sft", tmp_path / "sft", base)
    for number, path in enumerate([base, str(sft.model)]):
        result = run_stage("dpo", tmp_path / f"dpo{number}", path, optim={"epochs": 2})
        assert result.history[0]["train/margin"] == 0
        assert result.history[-1]["train/margin"] > 0
        assert {path.name for path in result.model.iterdir()} >= {ADAPTER_FILE}
        assert not any("reference" in name for name in load_file(result.model / ADAPTER_FILE))


def test_a_reward_model_that_continues_has_the_attention_asked_for(tmp_path, base):
    first = run_stage("reward", tmp_path / "first", base, attention="eager")
    more = run_stage("reward", tmp_path / "more", None, init=str(first.model), attention="eager")
    for result in (first, more):
        assert result.trained.config._attn_implementation == "eager"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_reward_model_continues_from_an_adapter(tmp_path, base, rank):
    first = run_stage("reward", tmp_path / "first", base)
    lora = {"rank": rank, "alpha": 8}
    more = run_stage("reward", tmp_path / "more", None, init=str(first.model), optim={"lr": 1e-12}, lora=lora)
    torch.testing.assert_close(logits(more.trained), logits(first.trained), atol=1e-4, rtol=1e-4)
    assert (more.model / ADAPTER_CONFIG).exists() == (rank > 0)
    with pytest.raises(UserError, match=r"^init: expected a reward model, got another kind of model in "):
        run_stage("reward", tmp_path / "none", None, init=str(run_stage("sft", tmp_path / "sft", base).model))


class Stop(BaseException):
    """Ends a run where it stands."""


@pytest.mark.parametrize("stage", STAGES)
def test_rule_16_a_resumed_run_ends_with_the_same_bits(tmp_path, base, stage, monkeypatch):
    options = {"optim": {"epochs": 2}, "checkpoint": {"every": 3}}
    options |= {"dtype": "bfloat16"} if stage == "reward" else {}  # the layers multiply by copies of what is resumed
    start = str(run_stage("sft", tmp_path / "sft", base).model) if stage == "dpo" else base
    whole = run_stage(stage, tmp_path / "whole", start, **options)
    step = SupervisedRun.step

    def stopping(self, index, log):
        if index == 4:
            raise Stop
        return step(self, index, log)

    monkeypatch.setattr(SupervisedRun, "step", stopping)
    with pytest.raises(Stop):
        run_stage(stage, tmp_path / "run", start, **options)
    monkeypatch.setattr(SupervisedRun, "step", step)
    saved = tmp_path / "run/checkpoints/step-000003"
    assert not (saved / "model.safetensors").exists()
    resumed = run_stage(stage, tmp_path / "run", start, resume=True, **options)
    for path in whole.model.iterdir():
        assert (resumed.model / path.name).read_bytes() == path.read_bytes(), path.name
    if stage == "sft":
        shutil.rmtree(tmp_path / "run/final")
        save_base(tmp_path / "base", seed=5)
        with raises_exactly("resume: expected the model weights that the run was begun with, got others", UserError):
            run_stage(stage, tmp_path / "run", start, resume=True, **options)


def test_the_command_line_merges(tmp_path, base):
    config = arguments.parse("sft", ["--model", base, "--data", "d", "--model.lora.rank", "4", "--merge"])
    assert config.model.lora == LoraConfig(rank=4, merge=True)


def test_a_head_of_two_outputs_is_refused(tmp_path, base):
    path = run_stage("reward", tmp_path / "rm", base).model
    tensors = load_file(path / ADAPTER_FILE)
    head = "base_model.model.score.weight"
    save_file(tensors | {head: tensors[head].repeat(2, 1)}, path / ADAPTER_FILE)
    message = f"init: expected a linear head 'score' with one output, got another in {str(path)!r}"
    with raises_exactly(message, UserError):
        read_adapter("init", str(path))
