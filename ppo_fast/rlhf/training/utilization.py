"""The share of the device's rate of matrix products that a run reaches: model FLOPs utilization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

_SIZE, _REPEATS = 4096, 10  # of the products that are timed: 0.2 ms each on an H100


@dataclass(frozen=True)
class Utilization:
    """Work of the phases of a step, by the weights that multiply each token; attention scores are not counted.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B, but the rate is that of a large product, measured.
    """

    rate: float | None  # floating-point operations per second; None: not measured
    work: dict[str, float]  # operations by phase, of one token in one pass

    def metrics(self, tokens: float, passes: Mapping[str, float], seconds: Mapping[str, float]) -> dict[str, float]:
        """Return perf/mfu of all phases together, and of each that multiplies matrices; none without a rate.

        Args:
            tokens: of the batch, prompts included; the share of one of several ranks.
            passes: of a phase over the batch; 1 where it is not named.
            seconds: by phase.
        """
        if self.rate is None:
            return {}
        done = {phase: count * tokens * passes.get(phase, 1.0) for phase, count in self.work.items()}
        shares = {f"perf/mfu_{phase}": done[phase] / max(seconds[phase], 1e-9) / self.rate for phase in done}
        return {"perf/mfu": sum(done.values()) / max(sum(seconds.values()), 1e-9) / self.rate} | shares


def training_work(module: nn.Module) -> int:
    """Operations of a token's forward and backward pass: 6 a weight, 4 where the weight has no gradient itself."""
    return 4 * matrix_weights(module) + 2 * matrix_weights(module, trained=True)


def matrix_weights(module: nn.Module, *, trained: bool = False) -> int:
    """Count the weights of matrices that multiply every token, also those in 4 bits; `trained`: with a gradient."""
    total = 0
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            continue
        for weight in part.parameters(recurse=False):
            if isinstance(part, nn.Linear):
                count = part.in_features * part.out_features if weight is part.weight else 0
            else:
                count = weight.numel() if weight.dim() == 2 else 0  # such as GPT-2's Conv1D
            total += count if weight.requires_grad or not trained else 0
    return total


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Time products of 4096 x 4096 matrices: operations per second; None on a CPU, where it would take too long."""
    if device.type != "cuda":
        return None
    x = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
    out = x @ x
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(_REPEATS):
        torch.mm(x, x, out=out)
    end.record()
    end.synchronize()
    return 2 * _SIZE**3 * _REPEATS / (start.elapsed_time(end) / 1e3)
