"""Dynamic scaling of the loss of float16 networks, whose small gradients would else be 0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppo_fast.rlhf.training.state import State


class LossScale:
    """The factor of the losses of float16 networks, by torch.amp.GradScaler; for other dtypes there is none.

    An optimizer step whose gradients overflow is left out and the factor halved; after 2,000 others it is doubled.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        # GradScaler asks the gradients of an optimizer whether they are finite. Their norm says it for those of all.
        self._norm = nn.Parameter(torch.zeros((), dtype=torch.float32, device=device))
        self._probe = torch.optim.SGD([self._norm])

    @property
    def enabled(self) -> bool:
        return self.scaler.is_enabled()

    @property
    def factor(self) -> Tensor | None:
        """The 0-d factor; None: there is none."""
        return self.scaler.scale(torch.ones_like(self._norm)).detach() if self.enabled else None

    @property
    def value(self) -> float:
        """The factor as a number; waits for the device."""
        return self.scaler.get_scale()

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss times the factor."""
        return self.scaler.scale(loss)

    def update(self, norms: Tensor) -> None:
        """Change the factor after a step whose gradients have these norms; the host waits for nothing."""
        if self.enabled:
            self._norm.grad = norms.detach().sum()
            self.scaler.unscale_(self._probe)
            self.scaler.update()

    def state_dict(self) -> State:
        return self.scaler.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.scaler.load_state_dict(state)
