"""A deep network is planned from shallow ones, to the byte."""

import dataclasses

import pytest

from ppo_fast.rlhf.models.saved import SavedModel, SavedModels
from ppo_fast.rlhf.planning.depth import Peaks, align, common_depth, measure
from ppo_fast.rlhf.planning.dry_run import DryRun
from tests.rlhf.planning.factories import LORA, MEASURED, PROMPT, make_config, tiny_policy

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
