"""The engine `vllm` on a fake of the package: the order of calls, what is handed over, what is refused."""

import dataclasses
import os
import sys

import peft
import pytest
import torch

from ppo_fast.rlhf import PPOConfig, UserError, train_ppo
from ppo_fast.rlhf.config.files import config_from_dict, load_config
from ppo_fast.rlhf.config.ppo import DataConfig, RolloutConfig
from ppo_fast.rlhf.data.prompts import load_prompts, make_batch
from ppo_fast.rlhf.decoding.vllm_engine import cache_bytes, import_vllm, running
from ppo_fast.rlhf.errors import install_command
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.models import load_models
from ppo_fast.rlhf.ppo.rollout import generate
from ppo_fast.rlhf.ppo.scoring import score
from tests.helpers import raises_exactly
from tests.rlhf.decoding.fake_vllm import package
from tests.rlhf.layout_factories import models_in, shift
from tests.rlhf.ppo.test_rollout import byte_tokenizer

CONFIG = RolloutConfig(engine="vllm", batch_size=4, max_new_tokens=6, temperature=0.7, top_k=60)


@pytest.fixture
def fake(monkeypatch):
    """install(**options) puts a fake package in place; the list of what was started."""

    def install(**options):
        modules, started = package(**options)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return started

    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")  # and removed afterwards
    yield install
    for name in [name for name in os.environ if name.startswith("VLLM_")]:
        del os.environ[name]


def sampled(models, seed=0, config=CONFIG):
    data = load_prompts(["w1 w2 w3", "w4"], models.tokenizer, DataConfig())
    batch = make_batch(data, [0, 0, 1, 1], models.pad_id, models.device)
    found = generate(models, batch, config, seed)
    rollout = score(models, found, config)
    return found, (rollout.logprobs - rollout.sampled_logprobs).abs().max().item()


@pytest.mark.parametrize("layout", ["separate", "adapters"])
def test_each_call_loads_the_merged_weights_and_sleeps_afterwards(fake, layout):
    started, models = fake(), models_in(layout)
    shift(models.trained("policy"))
    names = [*tiny.make_model(64, hidden=32, layers=1, heads=2).state_dict()]
    with running(models, CONFIG, 40):
        first, difference = sampled(models)
        assert difference <= 1e-5
        again, _ = sampled(models)
        assert torch.equal(again.input_ids, first.input_ids)
        assert not torch.equal(sampled(models, seed=1)[0].responses, first.responses)
        shift(models.trained("policy"), seed=2)
        moved, difference = sampled(models)
        assert difference <= 1e-5
        assert moved.logprobs.shape != first.logprobs.shape or not torch.equal(moved.logprobs, first.logprobs)
    (llm,) = started
    assert [call[0] for call in llm.calls] == [
        *("LLM", "sleep", "wake_up", "reload_weights", "reset_prefix_cache", "generate", "generate", "sleep"),
        *("wake_up", "reload_weights", "reset_prefix_cache", "generate", "sleep") * 3,
        *("shutdown", "cleanup"),
    ]
    assert all(call[1] == 1 for call in llm.calls if call[0] == "sleep")
    assert all(call[1] == names for call in llm.calls if call[0] == "reload_weights")
    options = llm.calls[0][1]
    assert (options["logprobs_mode"], options["load_format"], options["dtype"]) == (
        "processed_logprobs",
        "dummy",
        "float32",
    )
    assert (options["max_model_len"], options["max_num_seqs"], options["skip_tokenizer_init"]) == (40, 4, True)
    assert options["kv_cache_memory_bytes"] == 2 * 2 * 16 * 4 * 128 * 5
    assert llm.architectures == ["LlamaForCausalLM"]
    assert llm.files == {"config.json"}


def test_a_request_says_what_ends_a_response_and_how_it_is_drawn(fake):
    tokenizer = byte_tokenizer()
    policy = tiny.make_model(len(tokenizer), hidden=16, heads=2, layers=1)
    started, models = fake(), load_models(PPOConfig().model, torch.Generator(), policy=policy, tokenizer=tokenizer)
    config = RolloutConfig(engine="vllm", batch_size=4, max_new_tokens=3, temperature=0.5, top_p=0.9, stop=("w5",))
    with running(models, config, 40):
        sampled(models, config=config)
    check, real = (call[1] for call in started[0].calls if call[0] == "generate")
    assert len(check) == 8
    assert {(x.temperature, x.top_k, x.top_p, x.max_tokens, *x.stop) for x in check} == {(0.5, 0, 1.0, 1)}
    assert {(x.temperature, x.top_k, x.top_p, x.max_tokens, *x.stop) for x in real} == {(0.5, 0, 0.9, 3, "w5")}
    assert all(
        x.stop_token_ids == [models.eos_id] and x.ignore_eos and x.detokenize and not x.skip_special_tokens
        for x in real
    )
    assert all(x.include_stop_str_in_output and x.logprobs == 0 for x in real)
    assert len({x.seed for x in real}) == 4
    assert {"config.json", "tokenizer.json"} <= started[0].files


def test_eos_ends_a_response_and_belongs_to_it(fake):
    fake(sleeps=False)
    models = models_in("separate")
    with running(models, CONFIG, 64):
        found, _ = sampled(models, config=dataclasses.replace(CONFIG, max_new_tokens=40))
    assert {*found.ended.tolist()} == {True, False}
    for row, mask, ended in zip(found.responses.tolist(), found.mask, found.ended.tolist(), strict=True):
        length = int(mask.sum())
        assert row[:length].count(2) == ended == (row[length - 1] == 2)
        assert ended or length == 40


def test_a_load_that_does_not_take_stops_the_run(fake):
    started, models = fake(), models_in("separate")
    shift(models.trained("policy"))
    with running(models, CONFIG, 40):
        started[0].deaf = True
        expected = (
            r"^rollout\.engine: expected vllm to give the policy's log-probabilities after the weights were loaded, "
            r"got 8 that differ by 0\.\d+ on average$"
        )
        with pytest.raises(UserError, match=expected):
            sampled(models)
        assert started[0].calls[-1] == ("sleep", 1)


def test_a_package_that_is_missing_or_of_another_version_is_refused(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    command = install_command("vllm")  # in a checkout from there
    assert command.endswith("[vllm]'")
    with raises_exactly(f"this command needs vllm, which is not installed: {command}", UserError):
        import_vllm()
    for version in ("0.31.1", "0.34.0", "1.0"):
        fake(version=version)
        with raises_exactly(f"rollout.engine: expected vllm >= 0.32 and < 0.34, got {version!r}", UserError):
            import_vllm()
    fake(version="0.33.0+cpu")
    import_vllm()
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"  # the user's


def test_a_package_that_does_not_start_is_one_sentence(fake, monkeypatch):
    fake()

    def start(**_):
        raise ValueError("no such\narchitecture")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", start)
    with (
        raises_exactly("rollout.engine: vllm does not start: ValueError: no such architecture", UserError),
        running(models_in("separate"), CONFIG, 40),
    ):
        pass


def test_models_that_cannot_be_handed_over_are_refused(fake, monkeypatch):
    started = fake(device_type="cuda")
    with raises_exactly("rollout.engine: expected a vllm built for 'cpu', got 'cuda'", UserError):
        running(models_in("separate"), CONFIG, 40).__enter__()
    fake()
    models = models_in("separate")
    wrapped = peft.get_peft_model(models.policy, peft.LoraConfig(r=2, target_modules="all-linear"))
    object.__setattr__(models, "policy", wrapped)
    message = "rollout.engine: expected adapters by model.lora with 'vllm', got 'PeftModel'"
    with raises_exactly(message, UserError):
        running(models, CONFIG, 40).__enter__()
    for layout in ("separate", "adapters"):
        models = models_in(layout)
        models.policy.quantization_method = "bitsandbytes"
        with pytest.raises(UserError, match=r"^rollout\.engine: expected .* not quantized"):
            running(models, CONFIG, 40).__enter__()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    message = "rollout.engine: expected a run of one process with 'vllm', got 'a process group'"
    with raises_exactly(message, UserError):
        running(models_in("separate"), CONFIG, 40).__enter__()
    assert not started
    with raises_exactly(
        "rollout.engine: expected 'slots' or 'generate' outside of a training run, got 'vllm'", UserError
    ):
        sampled(models_in("separate"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rollout": {"function": "env.py:f"}}, "rollout.function: expected null with"),
        ({"rollout": {"temperature": 0.001}}, "rollout.temperature: expected 0.01 or more with"),
        (
            {"model": {"load_in_4bit": True, "layout": "adapters", "lora": {"rank": 2}}},
            "model.load_in_4bit: expected false with",
        ),
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code: expected false with"),
    ],
)
def test_settings_that_it_cannot_have_are_refused_before_anything_is_loaded(values, message):
    with pytest.raises(UserError, match=rf"^(config: )?{message} rollout\.engine 'vllm', got"):
        config_from_dict(values | {"rollout": {"engine": "vllm"} | values.get("rollout", {})})


def test_the_cache_is_planned_by_key_heads_and_whole_blocks():
    config = tiny.make_model(16, hidden=64, heads=4, num_key_value_heads=2).config
    assert cache_bytes(config, 3, 129, 2) == 2 * 2 * 2 * 16 * 2 * 128 * (3 * 2 + 1)
    gpt2 = tiny.make_model(16, arch="gpt2", hidden=64, heads=4).config
    assert cache_bytes(gpt2, 1, 128, 4) == 2 * 2 * 4 * 16 * 4 * 128 * 2


def test_a_run_is_corrected_by_default_repeats_and_resumes(fake, make_config, tokenizer):
    """The fake's noise depends on seed and row only, so here a resumed run equals the whole one."""
    started = fake()

    def run(directory, updates=4, resume=False, **values):
        config = make_config(
            updates=updates,
            output_dir=str(directory),
            rollout={"engine": "vllm", "batch_size": 8, "max_new_tokens": 4},
            checkpoint={"every": 2},
            **values,
        )
        policy = tiny.make_model(64, hidden=32, layers=1, heads=2)
        given = {"prompts": ["w1", "w2"], "policy": policy, "tokenizer": tokenizer, "resume": resume}
        return train_ppo(config, reward_fn=lambda completion_ids, **_: [float(len(x)) for x in completion_ids], **given)

    root = make_config().output_dir
    whole = run(f"{root}/whole")
    assert load_config(whole.directory / "config.yaml").rollout.correction == "truncate"
    assert all(row["mismatch/max"] == pytest.approx(1, abs=1e-4) for row in whole.history)
    run(f"{root}/half", updates=2)
    resumed = run(f"{root}/half", resume=True)
    assert resumed.history[-1]["objective/scores"] == whole.history[-1]["objective/scores"]
    assert [llm.calls[-1] for llm in started] == [("cleanup",)] * 3
    with pytest.raises(UserError, match=r"^rollout_fn: expected None with rollout\.engine 'vllm', got <function"):
        train_ppo(
            make_config(output_dir=f"{root}/other", rollout={"engine": "vllm"}),
            reward_fn=lambda **_: [],
            prompts=["w1"],
            policy=tiny.make_model(64, hidden=32, layers=1, heads=2),
            tokenizer=tokenizer,
            rollout_fn=lambda **_: [],
        )
