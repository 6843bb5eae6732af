"""Policy, reference and value model, in one of three layouts.

separate: three networks. shared: the value model is a head on the policy's own trunk. adapters: one frozen base with an
adapter each for policy and value model. The reference is the base, or a frozen adapter if the policy started from an
adapter or the reference moves.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_fast.rlhf.config.ppo import ModelConfig, ReferenceConfig, RewardConfig
from ppo_fast.rlhf.errors import UserError
from ppo_fast.rlhf.models.adapters import REFERENCE, TRAINED, VALUE, Adapters
from ppo_fast.rlhf.models.forward import backbone_of
from ppo_fast.rlhf.models.loading import (
    Loaded,
    checkpoint_activations,
    disable_dropout,
    load_policy,
    load_tokenizer,
    padding_id,
    recomputing,
)
from ppo_fast.rlhf.models.networks import Networks, equip, networks_of_rank
from ppo_fast.rlhf.models.offload import Offloaded, offload_activations
from ppo_fast.rlhf.models.saved import SavedModel, SavedModels, find_models
from ppo_fast.rlhf.models.sharding import Root, shard
from ppo_fast.rlhf.models.value import ValueModel, head_like, new_head
from ppo_fast.rlhf.world import by_all_ranks, current

Role = Literal["policy", "reference", "value"]


@dataclass(frozen=True)
class Models:
    """The networks of a run, on one device, dropout off in all of them."""

    policy: PreTrainedModel  # causal LM, trained
    reference: PreTrainedModel  # the policy as it was at the start, frozen; with adapters the same object as the policy
    value: ValueModel | None  # trained; None: advantages need no critic
    tokenizer: PreTrainedTokenizerBase
    pad_id: int  # fills prompts on the left and responses after EOS; may equal eos_id
    eos_ids: tuple[int, ...]  # each ends a response; the tokenizer's EOS is the first
    linear: bool  # scoring and update use the linear ops; False: the policy's own logits
    packed: bool = False  # scoring and update take sequences packed into one row; False: padded
    shared: bool = False  # the value model is a head on the policy's trunk
    adapters: Adapters | None = None  # on one base, one for each role
    offloaded: Offloaded | None = None  # the reference, which waits in host memory
    merge: bool = False  # a saved model is the base with the adapters added to it
    rewards: tuple[SavedModel, ...] = ()  # at `reward.models`

    @property
    def eos_id(self) -> int:
        """The tokenizer's EOS."""
        return self.eos_ids[0]

    @property
    def device(self) -> torch.device:
        """Where the networks run; those of several ranks are elsewhere until `split`."""
        return current().device or self.policy.device

    @contextlib.contextmanager
    def using(self, role: Role) -> Iterator[Any]:
        """The network of that role, ready on the device; what it does and its backward pass belong in the block.

        Blocks nest. In the layout "adapters" the adapter of `role` is active only inside the block; outside of all
        blocks the network is the policy.
        """
        with contextlib.ExitStack() as stack:
            if self.adapters is not None:
                stack.enter_context(self.adapters.active(self._adapter(role)))
            if role == "reference" and self.offloaded is not None:
                stack.enter_context(self.offloaded.present())
            yield getattr(self, role)

    @contextlib.contextmanager
    def running(self, role: Role) -> Iterator[Callable[..., Any]]:
        """`using`, by functions: run(function, ...) is function(network, ...), with the weights that it needs gathered.

        All ranks call it with the same functions in the same order; see :meth:`Root.run`.
        """
        with self.using(role):
            yield functools.partial(self.root(role).run, role)

    @contextlib.contextmanager
    def whole(self, role: Role) -> Iterator[Any]:
        """`using`, with all weights of the network whole: within the block it runs without the other ranks."""
        with self.using(role), self.root(role).whole(role) as network:
            yield network

    def root(self, role: Role) -> Root:
        """The networks that are gathered together, that of the role among them."""
        return self._roots[role]

    @functools.cached_property
    def _roots(self) -> dict[Role, Root]:
        """By role: one root for the networks that share weights."""
        value = {} if self.value is None else {"value": self.value}
        if self.adapters is not None:
            root = Root(policy=self.policy, reference=self.reference, **value)
            return {"policy": root, "reference": root, "value": root}
        policy = Root(policy=self.policy, **(value if self.shared else {}))
        return {
            "policy": policy,
            "reference": Root(reference=self.reference),
            "value": policy if self.shared else Root(**value),
        }

    def split(self, config: ModelConfig) -> None:
        """Split the weights over the ranks, if they are a process group, and equip the networks as `config` says.

        Each rank receives its rows from rank 0. Adapters are added before it, optimizers are made after it.
        """
        mesh = current().mesh
        if mesh is None:
            return
        for role, root in self._roots.items():
            if len(root.networks) and not isinstance(root, FSDPModule):
                shard(root, mesh, offload=config.offload and role == "reference")
        if self.adapters is not None:
            self.adapters.forget_copies()
        backbones = list[nn.Module]()
        for role, network in self._networks().items():
            backbone = backbone_of(network)
            if all(backbone is not other for other in backbones):
                backbones.append(backbone)
                with self.running(role) as run:
                    equip(network, config, run, self.device, linear=role == "policy" and config.fused_head)

    def _networks(self) -> dict[Role, PreTrainedModel]:
        """By role; the value model without its head."""
        value: dict[Role, PreTrainedModel] = {} if self.value is None else {"value": self.value.backbone}
        return {"policy": self.policy, "reference": self.reference, **value}

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Recompute activations in backward passes inside the block, if `model.gradient_checkpointing` is set."""
        with recomputing(self.policy, *filter(None, [self.value])):
            yield

    def offload_activations(self, to_host: Callable[[Tensor], Tensor]) -> None:
        """Let the trained networks keep in host memory what their backward passes need."""
        backbones = [backbone_of(self.policy), *([] if self.value is None else [self.value.backbone])]
        for backbone in {id(each): each for each in backbones}.values():
            offload_activations(backbone, to_host)

    def weights(self, role: Role) -> list[nn.Parameter]:
        """The weights that only the network of a role has; none if the reference is the base of adapters."""
        if role == "value" and self.value is None:
            return []
        head = [*self.value.head.parameters()] if role == "value" and self.value is not None else []
        if self.adapters is not None:
            name = self._adapter(role)
            return head + ([] if name is None else self.adapters.parameters(name))
        if role == "value" and self.shared:
            return head
        return [*getattr(self, role).parameters()]

    def trained(self, role: Role) -> list[nn.Parameter]:
        """The weights that an optimizer step of "policy" or "value" changes."""
        return [parameter for parameter in self.weights(role) if parameter.requires_grad]

    def _adapter(self, role: Role) -> str | None:
        assert self.adapters is not None
        return {"policy": TRAINED, "value": VALUE, "reference": self.adapters.reference}[role]


@by_all_ranks
def load_models(
    config: ModelConfig,
    generator: torch.Generator,
    *,
    policy: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward: RewardConfig = RewardConfig(),  # noqa: B008  # frozen
    reference: ReferenceConfig = ReferenceConfig(),  # noqa: B008
    critic: bool = True,
) -> Models:
    """Load what `config` names, or wrap the policy and tokenizer given; the policy given is trained in place.

    Without `critic` there is no value model.
    """
    saved = find_models(config, reward.models)
    loaded = load_policy(config, generator, policy, tokenizer, saved.policy)
    vocabulary = loaded.tokenizer.get_vocab()
    start = critic_start(config, saved, loaded.adapters, lambda each: load_tokenizer(each).get_vocab() == vocabulary)
    networks, normalized = networks_of_rank(config, generator.device), reward.normalize == "dataset"
    value = make_value_model(config, networks, loaded, start, generator, normalized=normalized) if critic else None
    models = build_models(config, loaded, value, reference)
    if config.offload_activations:
        if generator.device.type == "cpu":
            raise UserError(
                "model.offload_activations: expected false on a CPU, where host memory is its own, got True"
            )
        models.offload_activations(networks.to_host)
    offload = config.offload and models.adapters is None and current().mesh is None  # `split` offloads shares
    offloaded = Offloaded(models.reference, generator.device) if offload else None
    return dataclasses.replace(models, offloaded=offloaded, rewards=saved.rewards)


def critic_start(
    config: ModelConfig, saved: SavedModels, adapters: Adapters | None, same_vocabulary: Callable[[SavedModel], bool]
) -> SavedModel | None:
    """The model that the value model starts from; None: the policy, under a new head.

    It is the one at `value_path`, or else the first reward model, if that has the policy's vocabulary and, in the
    layout "adapters", is an adapter on the policy's base.
    """
    if saved.value is not None:
        return saved.value
    if config.layout == "shared" or not saved.rewards:
        return None
    first = saved.rewards[0]
    fits = adapters is None or first.value.adapter_on(adapters.base) is not None
    return first if fits and same_vocabulary(first) else None


def build_models(config: ModelConfig, loaded: Loaded, value: ValueModel | None, reference: ReferenceConfig) -> Models:
    """Policy, value model and the reference made of the policy, in their layout; for a run and for a plan."""
    policy, adapters = loaded.model, loaded.adapters
    if adapters is None:
        frozen = copy.deepcopy(policy).requires_grad_(False)
    elif loaded.saved is not None or reference.update != "fixed":
        adapters.copy(TRAINED, REFERENCE)
    return Models(
        policy=policy,
        reference=policy if adapters is not None else frozen,
        value=None if value is None else disable_dropout(value),
        tokenizer=loaded.tokenizer,
        pad_id=padding_id(loaded.tokenizer),
        eos_ids=loaded.eos_ids,
        linear=config.fused_head,
        packed=config.packing,
        shared=config.layout == "shared",
        adapters=adapters,
        merge=config.lora.merge,
    )


def make_value_model(
    config: ModelConfig,
    networks: Networks,
    loaded: Loaded,
    start: SavedModel | None,
    generator: torch.Generator,
    *,
    normalized: bool = True,
) -> ValueModel:
    """A backbone, as the layout has it, under the head of the model to start from, or under a new one.

    separate: a copy of the policy's backbone, or the model to start from; adapters: the base with a new adapter or
    with that of the model to start from; shared: the policy's own trunk. The head of a reward model gives its scores,
    `normalized` as PPO's reward has them: (score - mean) / std by its `reward_stats.json`. The head is float32.

    Raises UserError for a model that cannot be a value model or knows fewer tokens than the policy.
    """
    if loaded.adapters is not None:
        backbone, scores = _adapted_backbone(networks, loaded.adapters, start, generator)
    elif config.layout == "shared":
        backbone, scores = backbone_of(loaded.model), None
    else:
        backbone, scores = _own_backbone(config, networks, loaded.model, start)
        backbone.requires_grad_(True)
    if scores is None or start is None:
        head = new_head(config, backbone.config.hidden_size, generator)
    else:
        head = head_like(scores, start.stats if normalized else (0.0, 1.0))
    if not head.weight.is_meta:
        head = head.to(networks.device)
    return ValueModel(backbone, head.requires_grad_(True))


def _adapted_backbone(
    networks: Networks, adapters: Adapters, start: SavedModel | None, generator: torch.Generator
) -> tuple[PreTrainedModel, nn.Linear | None]:
    """The base with an adapter "value": a new one, or that of the model to start from with its head."""
    backbone = backbone_of(adapters.network)
    if start is None:
        adapters.add(VALUE, adapters.config(TRAINED), trained=True)
        adapters.draw(VALUE, generator)
        return backbone, None
    saved, base = start.value.adapter_on(adapters.base), adapters.base
    if saved is None:
        raise UserError(f"model.value_path: expected an adapter on {base!r}, the policy's base, got {start.path!r}")
    adapters.load(VALUE, saved, trained=True)
    return backbone, networks.head(saved, adapters.network)


def _own_backbone(
    config: ModelConfig, networks: Networks, policy: PreTrainedModel, start: SavedModel | None
) -> tuple[PreTrainedModel, nn.Linear | None]:
    """A network that shares nothing with the policy."""
    if start is None:
        return copy.deepcopy(backbone_of(policy)), None
    backbone, scores = networks.backbone(start.value, policy.dtype)
    known, needed = (len(model.get_input_embeddings().weight) for model in (backbone, policy))
    if known < needed:
        raise UserError(f"model.value_path: expected a model of at least {needed} tokens, as the policy, got {known}")
    networks.place(backbone)
    if config.gradient_checkpointing:
        checkpoint_activations(backbone)
    return backbone, scores
