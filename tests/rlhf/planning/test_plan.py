"""The memory plan: within a tenth of what the profiler measures, from configs alone, and what to change if too much."""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import bench_7b
from ppo_fast import cli
from ppo_fast.rlhf.config.files import config_from_dict, load_config
from ppo_fast.rlhf.decoding.vllm_engine import cache_bytes
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels
from ppo_fast.rlhf.planning.command import announce, describe, parse_size, print_plan
from ppo_fast.rlhf.planning.depth import Peaks, align, common_depth, measure
from ppo_fast.rlhf.planning.dry_run import DryRun
from ppo_fast.rlhf.planning.fakes import FourBits
from ppo_fast.rlhf.planning.plan import Change, Plan, advise, make_plan
from ppo_fast.rlhf.planning.shapes import count_weights, read_shapes
from ppo_fast.rlhf.planning.tracing import Timeline
from tests.helpers import product_scratch, raises_exactly
from tests.rlhf.memory_profile import measured_peaks

GIB, PROMPT = 2**30, 16
MEMORY_PAGE = Path(__file__).parents[3] / "docs" / "memory.md"
QWEN = bench_7b.QWEN | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def tiny_policy(**overrides):
    return tiny.make_model(4096, **({"hidden": 128, "layers": 2, "max_positions": 64} | overrides))


def make_config(directory, **values):
    """Batches of 16 responses of 32 tokens to prompts of 16, with those values changed."""
    base = {
        "threads": 1,
        "updates": 2,
        "rollout": {"batch_size": 16, "max_new_tokens": 32},
        "optim": {"minibatch_size": 16, "epochs": 1},
        "reward": {"missing_eos_penalty": 0},
        "output_dir": str(directory),
        "log": {"tensorboard": False, "console": False},
    }
    for name, value in values.items():
        base[name] = base.get(name, {}) | value if isinstance(value, Mapping) else value
    return config_from_dict(base)


def tiny_plan(directory, policy=None, **values):
    config = make_config(directory, **values)
    shapes = SavedModels(SavedModel(given=(policy or tiny_policy()).config))
    return make_plan(config, "cpu", shapes=shapes, prompt_tokens=PROMPT)


LORA = {"layout": "adapters", "lora": {"rank": 8}}
MICRO = {"optim": {"micro_batch_size": 4}, "rollout": {"micro_batch_size": 8}}
MEASURED = {
    "separate": ({}, {}),
    "materialized": ({}, {"model": {"fused_head": False}}),
    "micro-batches": ({}, MICRO),
    "checkpointing": ({}, {"model": {"gradient_checkpointing": True}}),
    "packed": ({}, {"model": {"packing": True}}),
    "tokens": ({}, {"model": {"packing": True}, "optim": {"tokens_per_pass": 190}}),
    "grouped heads, in the backward pass": (
        {"arch": "qwen2", "num_key_value_heads": 1},
        {"optim": {"in_backward": True}},
    ),
    "gpt2": ({"arch": "gpt2"}, {}),
    "generate, exact KL": (
        {},
        {
            "rollout": {"engine": "generate"},
            "kl": {"placement": "loss", "loss_estimator": "full"},
            "advantage": {"whiten": False},
        },
    ),
    "shared": ({}, {"model": {"layout": "shared"}}),
    "adapters": ({}, {"model": LORA} | MICRO),
    "group, moving reference": (
        {},
        {
            "model": LORA,
            "advantage": {"kind": "group"},
            "rollout": {"samples_per_prompt": 4},
            "reference": {"update": "ema", "every": 1},
        },
    ),
    "offloaded": ({}, {"model": {"offload": True}} | MICRO),
}


@pytest.mark.parametrize("case", MEASURED)
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


@pytest.fixture
def qwen(tmp_path):
    """A directory with the config of Qwen2.5-7B and nothing else."""
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(QWEN))
    return str(tmp_path / "qwen")


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
    row = next(line for line in MEMORY_PAGE.read_text().splitlines() if line.startswith(f"| `{preset}` |"))
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


@pytest.mark.parametrize(("text", "size"), [("24GB", 24e9), ("22.5 gib", 22.5 * GIB), ("512MiB", 2**29), ("1MB", 1e6)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "0GB", "24GBs", ""])
def test_other_sizes_are_refused(text):
    with raises_exactly(f"--gpu: expected a size such as 24GB or 22.5GiB, got {text!r}", UserError):
        parse_size(text)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Flags of a run on a model directory that holds a config alone, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    tiny_policy().config.save_pretrained("model")
    return ["plan", "--model", "model", "--rollout.batch-size", "16", "--rollout.max-new-tokens", "32"]


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


DEEP = MEASURED | {
    "bfloat16, packed, recomputing": (
        {},
        {"model": {"packing": True, "gradient_checkpointing": True, "dtype": "bfloat16"}},
    ),
    "4 bits on a GPU": ({}, {"model": LORA | {"load_in_4bit": True}}),
    "8 bits": ({}, {"model": {"layout": "shared", "offload": True}, "optim": {"name": "adamw_8bit"}}),
    "master weights": ({}, {"model": {"dtype": "bfloat16"}, "optim": {"master_weights": True}}),
    "packed on a GPU": ({}, {"model": LORA | {"packing": True, "dtype": "bfloat16"}}),
}
QUICK = ("separate",)


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in DEEP]
)
def test_a_deep_model_is_planned_from_shallow_ones_to_the_byte(case, tmp_path, monkeypatch):
    monkeypatch.setattr("ppo_fast.rlhf.planning.depth.FEWEST", 7)
    overrides, values = DEEP[case]
    config = make_config(tmp_path, **values)
    shapes = SavedModels(SavedModel(given=tiny_policy(layers=7, **overrides).config))
    device, whole = "cuda" if case.endswith("GPU") else "cpu", []

    def step(models):
        whole.append(DryRun(config, models, device, PROMPT).run())
        return whole[-1]

    found, shallow = measure(config, shapes, step), len(whole)
    full = step(shapes)
    assert found == Peaks(full.peaks(), full.host)
    if case in QUICK:  # in the others the whole step may have been taken
        assert shallow == 3
        assert whole[0].now < whole[1].now < whole[2].now < full.now


def test_layers_that_differ_are_planned_whole(tmp_path):
    config = make_config(tmp_path)

    def depth(**changes):
        shape = tiny_policy(arch="qwen2", layers=7).config
        vars(shape).update(changes)
        return common_depth(config, SavedModels(SavedModel(given=shape)))

    assert depth() == 7
    assert depth(layer_types=["full_attention"] * 6 + ["sliding_attention"]) is None
    uneven = make_config(tmp_path, model=LORA | {"lora": {"rank": 8, "targets": ["3.self_attn.q_proj"]}})
    shapes = SavedModels(SavedModel(given=tiny_policy(layers=7).config))
    assert common_depth(uneven, shapes) is None
    other = SavedModel(given=tiny_policy(layers=6).config)
    assert common_depth(config, dataclasses.replace(shapes, rewards=(other,))) is None


def test_operations_of_another_layer_are_passed_over():
    layer, head = [("mul", 8), ("add", 8)], [("norm", 8), ("head", 64), ("softmax", 64), ("sum", 1), ("mean", 1)]
    short, long = [*layer * 3, *head, ("stack", 3)], [*layer * 4, *head, ("stack", 4)]
    assert align(short, long) == [(i, i) for i in range(4)] + [(i, i + 2) for i in range(6, 12)]
    assert align(short, layer * 4) is None


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


def test_a_plan_that_fails_stops_no_run(saved, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("odd\nmodel")

    monkeypatch.setattr("ppo_fast.rlhf.planning.command.make_plan", fail)
    monkeypatch.setattr("ppo_fast.rlhf.planning.command.TINY", 0)
    seen = recording_console()
    announce(saved, seen)
    assert seen.export_text() == "no plan of the memory: RuntimeError: odd model\n"


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


def split_plan(directory, gpus, **values):
    config = make_config(directory, **values)
    shapes = SavedModels(SavedModel(given=tiny_policy(layers=4).config))
    return make_plan(config, "cpu", shapes=shapes, prompt_tokens=PROMPT, gpus=gpus)


@pytest.mark.parametrize("values", [{}, {"model": LORA}], ids=["all weights", "adapters"])
def test_each_of_several_gpus_has_its_share_and_holds_a_few_layers_whole(tmp_path, values):
    one, two = (split_plan(tmp_path, gpus, **values).phases for gpus in (1, 2))
    assert "gathered weights" not in one["update"]
    network = tiny_policy(layers=4)
    layer, embedding = (
        sum(weight.nbytes for weight in part.parameters())
        for part in (network.model.layers[0], network.model.embed_tokens)
    )
    everything = sum(weight.nbytes for weight in network.parameters())
    for item in ("weights", "adapters", "gradients", "optimizer states"):
        if item in one["update"]:
            assert two["update"][item] == pytest.approx(one["update"][item] / 2, rel=0.01)
    # The two largest groups are the embedding and a layer; the head is in the group of the rest.
    adapters = 0 if not values else one["update"]["adapters"]
    assert two["rollout"]["gathered weights"] == pytest.approx(everything, rel=0.01, abs=2 * adapters)
    assert two["scoring"]["gathered weights"] == pytest.approx(layer + 2 * embedding, rel=0.01, abs=2 * adapters)
    assert two["update"]["gathered weights"] > two["scoring"]["gathered weights"]
    # The networks of a run are whole before they are split.
    assert sum(two["start"].values()) == pytest.approx(sum(one["scoring"].get(x, 0) for x in ("weights", "adapters")))
    # Half of the responses: half of the keys and values.
    assert two["rollout"]["KV cache"] == pytest.approx(one["rollout"]["KV cache"] / 2, rel=0.1)


def test_several_gpus_keep_shares_of_idle_models_on_the_host(tmp_path):
    one, two = (split_plan(tmp_path, gpus, model={"offload": True}) for gpus in (1, 2))
    assert two.host == pytest.approx(one.host / 2, rel=0.01)


def test_the_command_plans_one_of_several_gpus(command, capsys):
    assert cli.main([*command, "--gpus", "4"]) == 0
    shown = capsys.readouterr().out
    assert "memory by phase on each of 4 GPUs" in shown
    assert "gathered weights" in shown
    assert cli.main([*command, "--gpus=4", "--optim.in-backward"]) == 2
    assert "optim.in_backward: expected false under torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_the_plans_of_several_gpus_in_the_docs_are_current(tmp_path):
    deeper = {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64}
    configs = {"7B": QWEN, "32B": QWEN | deeper | {"num_attention_heads": 40, "num_key_value_heads": 8}}
    lines = (MEMORY_PAGE.parent / "distributed.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| 7B |", "| 32B |"))]
    assert len(rows) == 6
    for name, preset, gpus, *shown in rows:
        (tmp_path / "config.json").write_text(json.dumps(configs[name]))
        config = load_config(preset=preset.strip("`"), flags={"model.path": str(tmp_path)})
        plan = make_plan(config, "cuda", gpus=int(gpus))
        phases = [sum(plan.phases[phase].values()) for phase in ("start", "rollout", "scoring", "update")]
        assert shown == [f"{count / GIB:.1f}" for count in (*phases, plan.host)], (name, preset, gpus)
