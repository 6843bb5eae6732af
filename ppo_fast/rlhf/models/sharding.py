"""Weights split over the ranks by torch's `fully_shard`, each network gathered layer by layer where it runs.

`fully_shard` gathers and splits in hooks of modules: a root's forward pass first. Two ways around them have silently
wrong gradients, measured on two ranks: `root.unshard()` and then the backbone (off by 0.89 of the gradient), and the
head's weight by `full_tensor()` after the root's forward pass (0.94). So here every forward pass is a function that a
:class:`Root` calls within its own, backbone, head and op together, and only sums, statistics or losses come out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.distribution import give_weights, take_weights
from ppo_fast.rlhf.models.value import ValueModel


class Root(nn.Module):
    """Networks whose forward passes are functions: run(name, function, ...) is function(network of that name, ...).

    Each network may be split over the ranks; then all ranks run the same functions in the same order.
    """

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.gathered = 0  # blocks in which all weights are whole

    def forward(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return function(self.networks[name], *args, **options)

    def run(self, name: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return function(network, ...), layers gathered one by one; with a gradient, its backward pass comes next.

        The function returns tensors of its own, no weights and no views of them.
        """
        if self.gathered:
            return self.forward(name, function, *args, **options)
        found = self(name, function, *args, **options)
        if isinstance(self, FSDPModule) and not torch.is_grad_enabled():
            self.reshard()  # fully_shard keeps a root's weights for a backward pass, and they would grow old
            _forget_passes(self)
        return found

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[nn.Module]:
        """The network of that name with all weights of the root whole: within the block it runs without other ranks.

        For `generate` and the like, of which each rank does another number of steps. Blocks nest.
        """
        if not isinstance(self, FSDPModule) or self.gathered:
            yield self.networks[name]
            return
        groups = [module for module in self.modules() if isinstance(module, FSDPModule)]
        self.set_reshard_after_forward(False)
        for group in groups:
            group.unshard()
        self.gathered += 1
        try:
            # Within a forward pass of the root: else each layer's own would begin one, and wait for streams, which a
            # captured CUDA graph cannot.
            with _inside_forward(self):
                yield self.networks[name]
        finally:
            self.gathered -= 1
            for group in groups:
                group.reshard()
            self.set_reshard_after_forward(True)
            self.set_reshard_after_forward(False, recurse=False)
            _forget_passes(self)


def shard(root: Root, mesh: DeviceMesh, *, offload: bool = False) -> None:
    """Split the weights of the networks over the ranks of the mesh, row by row; gradients are then sums over the ranks.

    Each rank receives its rows of rank 0's weights, and rank 0's buffers; the other ranks may hold networks without
    data, and what they hold does not count.

    The groups that are gathered together are the layers, the embedding unless it is tied to the head, a scalar head in
    float32, and the rest. `offload` keeps the shares in host memory on a GPU.

    Raises:
        UserError: trained weights of a group have two dtypes, which torch does not reduce together, or another rank
            has other weights than rank 0.
    """
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    offload = offload and mesh.device_type == "cuda"
    if offload:
        options["offload_policy"] = CPUOffloadPolicy()
    taken = take_weights(root)
    groups = find_groups(root)
    _check_dtypes(root, groups)
    ignored = {weight for weight in root.parameters() if not weight.is_floating_point()}
    for group in groups:
        fully_shard(group, reshard_after_forward=True, ignored_params=ignored, **options)
    fully_shard(root, reshard_after_forward=False, ignored_params=ignored, **options)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            # Sums in place of means; the factor by itself makes torch ask gloo for an operation that it does not have.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    give_weights(root, taken, torch.device("cpu" if offload else mesh.device_type))
    with torch.no_grad():  # the first forward pass makes this module the root of the others
        root.run(next(iter(root.networks)), lambda network: None)


def find_groups(root: nn.Module) -> list[nn.Module]:
    """Return the modules below the root whose weights are gathered together."""
    networks = [module for module in root.modules() if isinstance(module, PreTrainedModel)]
    layers = {name for network in networks for name in network._no_split_modules or ()}
    groups = [module for module in root.modules() if type(module).__name__ in layers]
    inside = {id(part) for group in groups for part in group.modules() if part is not group}
    groups = [group for group in groups if id(group) not in inside]
    heads = {id(head.weight) for head in (network.get_output_embeddings() for network in networks) if head is not None}
    embeddings = {id(embedding): embedding for embedding in (network.get_input_embeddings() for network in networks)}
    groups += [embedding for embedding in embeddings.values() if id(embedding.weight) not in heads]
    scalar = [module.head for module in root.modules() if isinstance(module, ValueModel)]
    scalar += [head for network in networks if isinstance(head := getattr(network, "score", None), nn.Linear)]
    return groups + [
        head for head in {id(head): head for head in scalar}.values() if head.weight.dtype == torch.float32
    ]


@contextlib.contextmanager
def _inside_forward(root: FSDPModule) -> Iterator[None]:
    """The block is part of a forward pass of the root to fully_shard."""
    context = root._get_fsdp_state()._state_ctx
    before, context.iter_forward_root = context.iter_forward_root, root._get_fsdp_state()
    try:
        yield
    finally:
        context.iter_forward_root = before


def _forget_passes(root: FSDPModule) -> None:
    """Drop the records of forward passes that no backward pass follows: it would clear them, they prefetch for it."""
    root._get_fsdp_state()._comm_ctx.post_forward_order.clear()
    for module in root.modules():  # type: ignore[attr-defined]  # of the module that it is mixed with
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is not None:
                group._post_forward_indices.clear()


def _check_dtypes(root: nn.Module, groups: list[nn.Module]) -> None:
    apart = {id(weight) for group in groups for weight in group.parameters()}
    rest = [weight for weight in root.parameters() if id(weight) not in apart]
    for weights in (*([*group.parameters()] for group in groups), rest):
        found = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights if weight.requires_grad})
        if len(found) > 1:
            raise UserError(
                f"torchrun: expected the trained weights of a layer to have one dtype, got {' and '.join(found)}"
            )
