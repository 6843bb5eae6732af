"""Bytes of weights and gradients that a rank holds whole for a moment, in addition to its shares of all."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ppo_fast.rlhf.models.sharding import Root, find_groups

NEIGHBORS = 2  # groups that are whole at one time: the one that computes, and the next one


def whole(root: Root) -> int:
    """Return the bytes of all weights, as sampling needs them."""
    return _bytes(root.parameters())


def largest_weight(network: nn.Module) -> int:
    """Return the bytes of the largest weight, which is whole on rank 0's device while it is dealt out."""
    return max(_bytes([weight]) for weight in network.parameters())


def layer_by_layer(root: Root) -> int:
    """Return the bytes of the rest of the root, which stays whole, and of the two largest groups."""
    groups = find_groups(root)
    grouped = {id(weight) for group in groups for weight in group.parameters()}
    rest = _bytes(weight for weight in root.parameters() if id(weight) not in grouped)
    return rest + sum(sorted((_bytes(group.parameters()) for group in groups), reverse=True)[:NEIGHBORS])


def trained(root: Root) -> int:
    """Return the bytes of a backward pass: the weights, and the largest gradient of a group, again in float32."""
    groups: list[nn.Module] = [*find_groups(root), root]
    seen, sizes = set[int](), list[int]()
    for group in groups:
        own = [weight for weight in group.parameters() if id(weight) not in seen and weight.requires_grad]
        seen |= {id(weight) for weight in group.parameters()}
        sizes.append(sum(weight.nbytes + 4 * weight.numel() for weight in own))
    return layer_by_layer(root) + max(sizes)


def is_split(weight: Tensor) -> bool:
    """Return whether `fully_shard` splits a tensor of a network: its parameters, except those of a base in 4 bits."""
    return isinstance(weight, nn.Parameter) and weight.is_floating_point()


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights if weight.is_floating_point())
