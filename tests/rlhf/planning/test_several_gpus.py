"""The plan of one of several GPUs."""

import json

import pytest

from ppo_fast import cli
from ppo_fast.rlhf.config.files import load_config
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels
from ppo_fast.rlhf.planning.plan import make_plan
from tests.rlhf.planning.factories import DOCS, GIB, LORA, PROMPT, QWEN, make_config, tiny_policy


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
    # Each gets its shares from rank 0, on whose device one weight is whole at a time.
    assert two["start"].pop("gathered weights") == embedding
    assert two["start"] == {name: two["scoring"][name] for name in ("weights", "adapters") if name in two["scoring"]}
    # Half of the responses: half of the keys and values.
    assert two["rollout"]["KV cache"] == pytest.approx(one["rollout"]["KV cache"] / 2, rel=0.1)


def test_a_base_in_four_bits_starts_whole_on_each_gpu(tmp_path):
    one, two = (split_plan(tmp_path, gpus, model=LORA | {"load_in_4bit": True}).phases for gpus in (1, 2))
    held = sum(one["scoring"].get(name, 0) for name in ("weights", "adapters"))
    assert sum(two["start"].values()) == pytest.approx(held, rel=0.01)


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
    lines = (DOCS / "distributed.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith(("| 7B |", "| 32B |"))]
    assert len(rows) == 6
    for name, preset, gpus, *shown in rows:
        (tmp_path / "config.json").write_text(json.dumps(configs[name]))
        config = load_config(preset=preset.strip("`"), flags={"model.path": str(tmp_path)})
        plan = make_plan(config, "cuda", gpus=int(gpus))
        phases = [sum(plan.phases[phase].values()) for phase in ("start", "rollout", "scoring", "update")]
        assert shown == [f"{count / GIB:.1f}" for count in (*phases, plan.host)], (name, preset, gpus)
