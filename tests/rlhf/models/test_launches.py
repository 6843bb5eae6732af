"""Operators of a decoder layer, each a kernel on a GPU: a base, adapters, recomputed; what adapters add is products."""

import collections

import pytest
import torch

from ppo_fast.rlhf.config.model import LoraConfig
from ppo_fast.rlhf.models import tiny
from ppo_fast.rlhf.models.adapters import adapt
from ppo_fast.rlhf.models.loading import checkpoint_activations, recomputing
from tests.rlhf.models.test_adapter_layers import Counter

IDS = torch.arange(16)[None]


def operators(layers, kind):
    """Names of the operators of the second forward and the second backward pass, counted: gradients accumulate."""
    network = tiny.make_model(64, arch="qwen2", hidden=32, layers=layers, heads=2).bfloat16()
    network.requires_grad_(kind == "all weights")
    if kind.startswith("adapters"):
        adapt(network, LoraConfig(rank=4), None, torch.Generator().manual_seed(0))
    if kind.endswith("recomputed"):
        checkpoint_activations(network)
    inputs = network.get_input_embeddings()(IDS).detach().requires_grad_()
    with recomputing(network):
        for _ in range(2):
            with Counter() as forward:
                states = network.base_model(inputs_embeds=inputs, position_ids=IDS, use_cache=False).last_hidden_state
            gradient = torch.ones_like(states)
            with Counter() as backward:
                states.backward(gradient)
    return collections.Counter(forward.names), collections.Counter(backward.names)


def of_a_layer(kind):
    """Operators of one decoder layer, forward and backward."""
    return [more - fewer for more, fewer in zip(operators(2, kind), operators(1, kind), strict=True)]


# Measured with transformers 5.17; with peft's own forward pass 80 and 137, recomputed 212.
BOUNDS = {
    "frozen": (38, 60),
    "all weights": (38, 86),
    "adapters": (52, 116),
    "adapters, recomputed": (52, 167),
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_decoder_layer_launches_no_more_than(kind):
    found = [sum(counts.values()) for counts in of_a_layer(kind)]
    assert all(count <= bound for count, bound in zip(found, BOUNDS[kind], strict=True)), found


def test_adapters_add_products_only():
    """Of 7 linear layers: two products forward, four backward; on a CPU two casts of the gradients of A and B."""
    with_adapters, without = of_a_layer("adapters"), of_a_layer("frozen")
    added = [collections.Counter(x) - collections.Counter(y) for x, y in zip(with_adapters, without, strict=True)]
    assert added[0] == {"addmm": 7, "addmm_": 7}
    assert added[1] == {"addmm": 7, "addmm_": 7, "mm": 14, "_to_copy": 14, "add_": 14}
