"""Policy, reference and value model, in one of three layouts.

separate: three networks. shared: the value model is a head on the policy's own trunk. adapters: one frozen base with an
adapter each for policy and value model; the reference is the base alone, or a frozen adapter where the policy began
with an adapter or the reference moves.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ppo_fast.rlhf.config.ppo import ModelConfig, ReferenceConfig, RewardConfig
from ppo_fast.rlhf.models.adapters import (
    REFERENCE,
    TRAINED,
    VALUE,
    Adapters,
)
from ppo_fast.rlhf.models.loading import (
    Loaded,
    disable_dropout,
    load_policy,
    load_tokenizer,
    padding_id,
    recomputing,
)
from ppo_fast.rlhf.models.offload import Offloaded
from ppo_fast.rlhf.models.value import ValueModel, adapter_on, make_value_model

Role = Literal["policy", "reference", "value"]


@dataclass(frozen=True)
class Models:
    """The networks of a run, on one device, dropout off in all of them."""

    policy: Any  # causal LM, trained
    reference: Any  # causal LM, frozen: the policy as it was at the start; the policy itself where adapters tell them
    value: ValueModel  # trained
    tokenizer: Any
    pad_id: int  # fills prompts on the left and responses after EOS; may equal eos_id
    eos_ids: tuple[int, ...]  # each ends a response; the tokenizer's EOS is the first
    linear: bool  # scoring and update use the linear ops; False: the policy's own logits
    packed: bool = False  # scoring and update take sequences packed into one row; False: padded
    shared: bool = False  # the value model is a head on the policy's trunk
    adapters: Adapters | None = None  # on one base, one for each role
    offloaded: Offloaded | None = None  # the reference, which waits in host memory
    merge: bool = False  # a saved model is the base with the adapters added to it

    @property
    def eos_id(self) -> int:
        """The tokenizer's EOS."""
        return self.eos_ids[0]

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @contextlib.contextmanager
    def using(self, role: Role) -> Iterator[Any]:
        """The network of that role, ready on the device; what it does and its backward pass belong in the block.

        Blocks nest. In the layout "adapters" a network is that of its role within its block alone; outside of all
        blocks it is the policy.
        """
        with contextlib.ExitStack() as stack:
            if self.adapters is not None:
                stack.enter_context(self.adapters.active(self._adapter(role)))
            if role == "reference" and self.offloaded is not None:
                stack.enter_context(self.offloaded.present())
            yield getattr(self, role)

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Recompute activations in backward passes inside the block, if `model.gradient_checkpointing` is set."""
        with recomputing(self.policy, self.value):
            yield

    def weights(self, role: Role) -> list[nn.Parameter]:
        """What the network of a role has for itself; nothing where the reference is the base of adapters."""
        head = [*self.value.head.parameters()] if role == "value" else []
        if self.adapters is not None:
            name = self._adapter(role)
            return head + ([] if name is None else self.adapters.parameters(name))
        if role == "value" and self.shared:
            return head
        return [*getattr(self, role).parameters()]

    def trained(self, role: Role) -> list[nn.Parameter]:
        """What an optimizer step of "policy" or "value" changes."""
        return [parameter for parameter in self.weights(role) if parameter.requires_grad]

    def _adapter(self, role: Role) -> str | None:
        assert self.adapters is not None
        return {"policy": TRAINED, "value": VALUE, "reference": self.adapters.reference}[role]


def load_models(
    config: ModelConfig,
    generator: torch.Generator,
    *,
    policy: Any = None,
    tokenizer: Any = None,
    reward: RewardConfig = RewardConfig(),  # noqa: B008  # frozen
    reference: ReferenceConfig = ReferenceConfig(),  # noqa: B008
) -> Models:
    """Load what `config` names, or wrap the policy and tokenizer given; the policy given is trained in place.

    The value model starts from `value_path`, or else from the first reward model where that has the policy's
    vocabulary; of adapters, where it is an adapter on the policy's base. That of the layout "shared" is a new head.
    """
    loaded = load_policy(config, generator, policy, tokenizer)
    policy, tokenizer, adapters = loaded.model, loaded.tokenizer, loaded.adapters
    if config.layout != "shared" and config.value_path is None and reward.models:
        config = dataclasses.replace(config, value_path=_critics_start(config, reward.models[0], loaded))
    value = make_value_model(config, loaded, generator, normalized=reward.normalize == "dataset")
    if adapters is None:
        frozen = copy.deepcopy(policy).requires_grad_(False)
    elif loaded.saved is not None or reference.update != "fixed":
        adapters.copy(TRAINED, REFERENCE)
    return Models(
        policy=policy,
        reference=policy if adapters is not None else frozen,
        value=disable_dropout(value),
        tokenizer=tokenizer,
        pad_id=padding_id(tokenizer),
        eos_ids=loaded.eos_ids,
        linear=config.fused_head,
        packed=config.packing,
        shared=config.layout == "shared",
        adapters=adapters,
        offloaded=Offloaded(frozen, generator.device) if config.offload and adapters is None else None,
        merge=config.lora.merge,
    )


def _critics_start(config: ModelConfig, path: str, loaded: Loaded) -> str | None:
    """The path of a reward model if the value model can start from it."""
    fits = loaded.adapters is None or adapter_on(loaded.adapters.base, "reward.models", path) is not None
    own = load_tokenizer(path, config.trust_remote_code) if fits else None
    return path if own is not None and own.get_vocab() == loaded.tokenizer.get_vocab() else None
