"""The reference model of the KL: fixed at the start, or following the policy."""

from __future__ import annotations

import torch

from ppo_fast.rlhf.config.ppo import ReferenceConfig
from ppo_fast.rlhf.integrity import copy_tensors, numbered
from ppo_fast.rlhf.models.models import Models
from ppo_fast.rlhf.split import local
from ppo_fast.rlhf.training.state import State


class Reference:
    """Changes the reference every `every` updates: a copy of the policy, or its exponential moving average.

    ema: reference = decay * reference + (1 - decay) * policy, parameter by parameter; of adapters these are A and B.
    """

    def __init__(self, models: Models, config: ReferenceConfig) -> None:
        self.models, self.config = models, config

    @torch.no_grad()
    def update(self, index: int) -> None:
        """Follow the policy after update `index`, from 0."""
        if self.config.update == "fixed" or (index + 1) % self.config.every:
            return
        share = 1.0 if self.config.update == "replace" else 1 - self.config.decay
        pairs = zip(self.models.weights("reference"), self.models.weights("policy"), strict=True)
        for reference, policy in pairs:
            own = local(reference)
            own.lerp_(local(policy).to(own), share)  # the reference may be offloaded to host memory

    def state_dict(self) -> State:
        """Return the reference's weights, unless it is the model at the start."""
        return {} if self.config.update == "fixed" else {"weights": self.models.weights("reference")}

    @torch.no_grad()
    def load_state_dict(self, state: State) -> None:
        if state:
            own = numbered(self.models.weights("reference"))
            copy_tensors(own, numbered(state["weights"]), "resume: reference")
