"""The memory plan: within a tenth of what the profiler measures, from configs alone, and what to change if too much."""

import dataclasses

import pytest
import torch

from ppo_fast.rlhf.config.files import load_config
from ppo_fast.rlhf.decoding.vllm_engine import cache_bytes
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels
from ppo_fast.rlhf.planning.fakes import FourBits
from ppo_fast.rlhf.planning.plan import Plan, advise, make_plan
from ppo_fast.rlhf.planning.shapes import count_weights, read_shapes
from ppo_fast.rlhf.planning.tracing import Timeline
from tests.helpers import product_scratch, raises_exactly
from tests.rlhf.memory_profile import measured_peaks
from tests.rlhf.planning.factories import DOCS, GIB, LORA, MEASURED, MICRO, PROMPT, make_config, tiny_plan, tiny_policy

HELD_BY_OTHERS = ("separate", "micro-batches", "packed")  # what they have is in offloaded, adapters and tokens too


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in HELD_BY_OTHERS else case for case in MEASURED]
)
def test_a_plan_is_within_a_tenth_of_what_the_profiler_measures(case, tmp_path, tokenizer):
    overrides, values = MEASURED[case]
    plan = tiny_plan(tmp_path, tiny_policy(**overrides), **values)
    measured = measured_peaks(
        make_config(tmp_path / "run", **values), lambda: tiny_policy(**overrides), tokenizer, PROMPT
    )
    assert {*plan.phases} == {"rollout", "scoring", "update"} <= {*measured}
    for phase, account in plan.phases.items():
        planned = sum(account.values()) + plan.host  # on a CPU host memory is the device's
        assert planned == pytest.approx(measured[phase], rel=0.1), (phase, account)


@pytest.mark.filterwarnings("ignore:a bfloat16 weight")
def test_a_bfloat16_plan_is_within_a_tenth(tmp_path, tokenizer):
    values = {"model": {"dtype": "bfloat16"}}
    plan = tiny_plan(tmp_path, **values)
    make = lambda: tiny_policy().to(torch.bfloat16)  # noqa: E731
    measured = measured_peaks(make_config(tmp_path / "run", **values), make, tokenizer, PROMPT)
    for phase, account in plan.phases.items():
        planned = sum(account.values())
        if "logits chunk" in account:
            planned += product_scratch(512, 128, 4096, torch.bfloat16)
        assert planned == pytest.approx(measured[phase], rel=0.1), (phase, account)


def test_a_plan_counts_the_copy_in_vllm_where_it_lies(tmp_path):
    """On a GPU it waits in host memory after the rollout; on a CPU it stays, with its keys and values."""
    config = make_config(tmp_path, rollout={"engine": "vllm", "micro_batch_size": 8}, model=LORA)
    policy = tiny_policy()
    shapes = SavedModels(SavedModel(given=policy.config))
    weights = sum(x.nbytes for x in policy.parameters())
    longest = min(config.data.max_prompt_tokens + 32, policy.config.max_position_embeddings)
    cache = cache_bytes(policy.config, 8, longest, 4)
    for device in ("cpu", "cuda"):
        plan = make_plan(config, device, shapes=shapes, prompt_tokens=PROMPT)
        rollout, update = plan.phases["rollout"], plan.phases["update"]
        assert rollout["weights"] - plan.phases["scoring"]["weights"] == (0 if device == "cpu" else weights)
        assert update["weights"] // weights == (2 if device == "cpu" else 1)
        assert rollout["KV cache"] == cache
        assert update.get("KV cache", 0) == (cache if device == "cpu" else 0)
        assert plan.host == (weights if device == "cuda" else 0)


def test_adapters_without_masters_are_planned_in_the_dtype_of_the_base(tmp_path):
    model = LORA | {"dtype": "bfloat16"}
    kept, dropped = (
        tiny_plan(tmp_path, tiny_policy(layers=1), model=model, optim={"master_weights": choice}).phases["rollout"]
        for choice in (None, False)
    )
    head = 4 * (128 + 1)  # of the value model, float32
    trained, moments = kept["adapters"] - head, kept["optimizer states"]
    assert (dropped["adapters"] - head) * 3 == trained  # 2 bytes for 4 and a copy of 2
    assert moments / 2 < dropped["optimizer states"] < 0.51 * moments  # the head's and the counts stay


def test_reward_models_are_in_the_plan_and_measured(tmp_path, tokenizer):
    directory = str(tmp_path / "reward")
    save_reward_model(directory, tokenizer)
    values = {"reward": {"models": [directory], "missing_eos_penalty": 0}}
    for offload in (False, True):
        config = make_config(tmp_path / f"run{offload}", **values, model={"offload": offload})
        shapes = read_shapes(config, tiny_policy().config)
        plan = make_plan(config, "cpu", shapes=shapes, prompt_tokens=PROMPT)
        measured = measured_peaks(config, tiny_policy, tokenizer, PROMPT)
        for phase in ("rollout", "reward", "update"):
            planned = sum(plan.phases[phase].values()) + plan.host
            assert planned == pytest.approx(measured[phase], rel=0.1), (phase, offload)


def save_reward_model(directory, tokenizer):
    from transformers import AutoModelForSequenceClassification

    shape = tiny_policy(layers=1).config
    shape.num_labels = 1
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def test_items_are_exact_where_they_can_be(tmp_path):
    policy = tiny_policy()
    weights = 4 * sum(parameter.numel() for parameter in policy.parameters())
    head = 4 * policy.get_output_embeddings().weight.numel()
    critic = weights - head + 4 * (128 + 1)
    rollout, update = (tiny_plan(tmp_path, **MICRO).phases[phase] for phase in ("rollout", "update"))
    inv_freq = 3 * 2 * 64
    assert rollout["weights"] == pytest.approx(2 * weights + critic, abs=2 * inv_freq)
    assert rollout["optimizer states"] == pytest.approx(2 * (weights + critic), abs=1000)  # and a count each
    assert rollout["KV cache"] == 2 * 2 * 8 * (PROMPT + 32) * 128 * 4
    assert update["gradients"] == weights + critic
    assert update["logits chunk"] == 4 * 32 * 4096 * 4


def test_checkpointing_offloading_adapters_and_4_bits_each_need_less(tmp_path):
    plain = tiny_plan(tmp_path)
    recomputing = tiny_plan(tmp_path, model={"gradient_checkpointing": True})
    assert recomputing.phases["update"]["activations"] < 0.7 * plain.phases["update"]["activations"]
    offloaded = tiny_plan(tmp_path, model={"offload": True})
    reference = 4 * sum(parameter.numel() for parameter in tiny_policy().parameters())
    assert offloaded.host == pytest.approx(reference, rel=0.01)
    assert plain.phases["update"]["weights"] - offloaded.phases["update"]["weights"] == offloaded.host
    assert offloaded.phases["scoring"]["weights"] == plain.phases["scoring"]["weights"]
    adapters = tiny_plan(tmp_path, model=LORA)
    assert adapters.peak < plain.peak
    assert adapters.phases["update"]["adapters"] > 0
    quantized = tiny_plan(tmp_path, model=LORA | {"load_in_4bit": True})
    linear = sum(layer.weight.numel() for layer in linear_layers(tiny_policy()))
    held = linear // 2 + linear // 64 + linear // 64 // 64
    saved = adapters.phases["update"]["weights"] - quantized.phases["update"]["weights"]
    assert saved == pytest.approx(4 * linear - held, rel=1e-3)


def test_peft_directories_are_planned_by_their_configs(tmp_path):
    peft = pytest.importorskip("peft")
    base, adapter, scorer = (str(tmp_path / name) for name in ("base", "adapter", "scorer"))
    tiny_policy(layers=1).config.save_pretrained(base)
    targets = ["q_proj", "v_proj"]
    shape = {"r": 8, "target_modules": targets, "base_model_name_or_path": base}
    peft.LoraConfig(**shape).save_pretrained(adapter)
    peft.LoraConfig(**shape, modules_to_save=["score"]).save_pretrained(scorer)
    lora = LORA | {"lora": {"rank": 8, "alpha": 8, "targets": targets}}

    def plan(path, rewards=(), **model):
        values = {"model": {"path": path} | model, "reward": {"models": rewards}}
        return make_plan(make_config(tmp_path, **values), "cpu", prompt_tokens=PROMPT).phases

    plain, from_adapter, judged = plan(base, **lora), plan(adapter, **lora), plan(base, [scorer], **lora)
    one = 4 * 8 * (128 + 128) * len(targets)
    assert plain["update"]["weights"] == from_adapter["update"]["weights"] == judged["update"]["weights"]
    assert from_adapter["update"]["adapters"] - plain["update"]["adapters"] == one  # the reference
    assert judged["update"]["adapters"] - plain["update"]["adapters"] == one
    assert "reward" in judged
    apart = plan(base, [scorer])
    assert apart["update"]["weights"] > plan(base)["update"]["weights"]


def test_a_layer_of_4_bits_is_as_large_as_that_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    real = bitsandbytes.nn.Linear4bit(512, 1024, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = real.weight.quant_state
    held = [real.weight, state.absmax, state.state2.absmax]
    ours = FourBits(torch.nn.Linear(512, 1024, bias=False))
    assert ours.weight.nbytes == sum(x.nbytes for x in held)
    x = torch.randn(3, 512, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad.shape == x.shape


def test_attention_of_a_packed_row_on_a_gpu_makes_no_mask_and_repeats_no_heads(tmp_path):
    policy = tiny_policy(arch="qwen2", num_key_value_heads=1, layers=1)
    given = {"shapes": SavedModels(SavedModel(given=policy.config)), "prompt_tokens": PROMPT}
    by_ends, by_mask = (
        make_plan(
            make_config(tmp_path, model={"packing": True, "dtype": "bfloat16", "attention": kind}), "cuda", **given
        )
        for kind in (None, "sdpa")
    )
    assert by_ends.phases["update"]["activations"] < by_mask.phases["update"]["activations"]
    assert by_ends.phases["rollout"]["KV cache"] == by_mask.phases["rollout"]["KV cache"]


def linear_layers(policy):
    head = policy.get_output_embeddings()
    return [layer for layer in policy.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]


def test_a_plan_is_the_same_every_time(tmp_path):
    first, second = (tiny_plan(tmp_path, tiny_policy(layers=1), **MICRO) for _ in range(2))
    assert first == second


@pytest.mark.slow
def test_a_7b_is_planned_from_its_config_alone(qwen, tmp_path):
    model = {"path": qwen, "dtype": "bfloat16", "gradient_checkpointing": True}
    values = {"optim": {"minibatch_size": 4}, "rollout": {"batch_size": 4, "max_new_tokens": 505}}
    lora = LORA | {"lora": {"rank": 64}}
    full = make_plan(make_config(tmp_path, model=model | {"layout": "shared"}, **values), "cuda", prompt_tokens=8)
    small = make_plan(make_config(tmp_path, model=model | lora, **values), "cuda", prompt_tokens=8)
    assert small.phases["update"]["weights"] / GIB == pytest.approx(14.2, abs=0.05)
    assert full.phases["update"]["weights"] == pytest.approx(2 * small.phases["update"]["weights"], rel=1e-3)
    assert small.phases["rollout"]["KV cache"] == 4 * 512 * 56 * 1024
    assert small.peak < full.peak
    assert small.phases["update"]["fragmentation"] > 0
    assert small.phases["update"]["CUDA context"] == full.phases["update"]["CUDA context"] > 0


@pytest.mark.parametrize(
    "preset", ["7b-80g-lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("7b-80g-full", "7b-24g"))]
)
def test_the_peaks_in_the_readme_are_those_of_the_presets(qwen, preset):
    row = next(line for line in (DOCS / "memory.md").read_text().splitlines() if line.startswith(f"| `{preset}` |"))
    plan = make_plan(load_config(preset=preset, flags={"model.path": qwen}), "cuda")
    assert f" {plan.peak / GIB:.1f} GiB" in row
    if "4bit" in row:
        small = make_plan(load_config(preset=preset, flags={"model.path": qwen, "model.load_in_4bit": "true"}), "cuda")
        assert f"{small.peak / GIB:.1f} with `--model.load-in-4bit`" in row


@pytest.mark.slow
def test_what_to_change_is_told_until_it_fits(tmp_path):
    config, shapes = make_config(tmp_path), SavedModels(SavedModel(given=tiny_policy(layers=1).config))
    given = {"device": "cpu", "shapes": shapes, "prompt_tokens": PROMPT}
    plan = make_plan(config, **given)
    assert [*advise(config, plan, **given)] == []
    half = make_plan(make_config(tmp_path, optim={"micro_batch_size": 8}), **given)
    changes = [*advise(config, dataclasses.replace(plan, limit=half.peak), **given)]
    assert [(each.name, each.value, each.plan.peak) for each in changes] == [("optim.micro_batch_size", 8, half.peak)]
    changes = [*advise(config, dataclasses.replace(plan, limit=1), **given)]
    names = [each.name for each in changes]
    assert names[0] == "optim.micro_batch_size"
    assert {"model.offload", "model.dtype", "model.layout", "model.load_in_4bit"} <= {*names}
    peaks = [plan.peak, *(each.plan.peak for each in changes)]
    assert peaks == sorted(peaks, reverse=True)
    assert not changes[-1].plan.fits


@pytest.mark.slow
def test_a_run_that_is_to_be_merged_is_not_told_to_take_4_bits(tmp_path):
    lora = {"model": {"layout": "adapters", "lora": {"rank": 4, "merge": True}}}
    config, shapes = make_config(tmp_path, **lora), SavedModels(SavedModel(given=tiny_policy().config))
    given = {"device": "cpu", "shapes": shapes, "prompt_tokens": PROMPT}
    changes = [*advise(config, make_plan(config, limit=1, **given), **given)]
    assert changes
    assert "model.load_in_4bit" not in [each.name for each in changes]


def test_a_batch_is_made_no_smaller_than_its_own_phases_need(monkeypatch):
    """A GiB a row of each batch, and 10 to the update that recomputing alone takes away."""

    def fake(config, device, *, limit=None):
        sizes = config.rollout.micro_batch_size or 16, config.optim.micro_batch_size or 16
        fixed = 0 if config.model.gradient_checkpointing else 10
        phases = {"rollout": {"KV cache": sizes[0] * GIB}, "update": {"activations": (sizes[1] + fixed) * GIB}}
        return Plan(phases, 0, limit)

    monkeypatch.setattr("ppo_fast.rlhf.planning.plan.make_plan", fake)
    config = make_config("run")
    changes = [*advise(config, fake(config, "cpu", limit=8 * GIB), device="cpu")]
    assert [(each.name, each.value) for each in changes] == [
        ("optim.micro_batch_size", 1),
        ("rollout.micro_batch_size", 8),
        ("model.gradient_checkpointing", True),
    ]
    assert changes[-1].plan.fits


def test_passes_by_tokens_are_advised_by_halves(monkeypatch):
    def fake(config, device, *, limit=None):
        return Plan({"update": {"activations": config.optim.tokens_per_pass * GIB}}, 0, limit)

    monkeypatch.setattr("ppo_fast.rlhf.planning.plan.make_plan", fake)
    config = make_config("run", optim={"tokens_per_pass": 1000})
    changes = [*advise(config, fake(config, "cpu", limit=300 * GIB), device="cpu")]
    assert [(each.name, each.value) for each in changes] == [("optim.tokens_per_pass", 250)]


def test_prompts_are_as_long_as_the_context_leaves_room(tmp_path):
    shapes = SavedModels(SavedModel(given=tiny_policy(layers=1).config))
    config = make_config(tmp_path, rollout={"batch_size": 16, "max_new_tokens": 64})
    with raises_exactly("rollout.max_new_tokens: expected less than the model's context of 64, got 64", UserError):
        make_plan(config, "cpu", shapes=shapes)
    by_context = make_plan(make_config(tmp_path), "cpu", shapes=shapes)
    assert by_context == make_plan(make_config(tmp_path), "cpu", shapes=shapes, prompt_tokens=32)


@pytest.mark.parametrize("shape", [{}, {"hidden": 64, "layers": 1}])
def test_weights_are_counted_from_the_config(shape):
    policy = tiny_policy(**shape)
    counted = count_weights(SavedModel(given=policy.config), make_config("run").model)
    assert counted == sum(weight.nbytes for weight in policy.parameters())


def test_a_timeline_knows_what_lives_when():
    timeline = Timeline(lambda func, args: {"inside": 4096} if "cos" in str(func) else {})
    with timeline:
        kept = torch.ones(256)
        with timeline.phase("first"):
            a = kept + 1
            b = a * 2
            del a
            b.cos_()
        with timeline.phase("second"):
            timeline.name("kept", [kept])
            b = b + kept
        with timeline.phase("first"):
            kept.add_(1)
        timeline.name(None, [b])
    peaks = timeline.peaks()
    assert peaks["first"] == {"kept": 1024, "activations": 1024, "inside": 4096}
    assert peaks["second"] == {"kept": 1024, "activations": 1024}  # of b, whose sum is in host memory
    assert timeline.host == 1024
