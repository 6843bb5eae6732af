"""The clipped objective of PPO against the probability ratio, drawn from the shipped op.

For a good action (A = +1) the objective min(r*A, clip(r, 0.8, 1.2)*A) is flat above r = 1.2: nothing is
gained by raising its probability further. For a bad one (A = -1) it is flat below r = 0.8, and steep
without limit above; the dual clip bounds it there by c*A. Values and slopes come from
``ppo_fast.policy_loss`` and its backward. (Schulman et al. 2017, figure 1; Ye et al. 2020 for the dual clip.)

    python examples/clipped_objective.py [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import ppo_fast as ppo

CLIP = ppo.PolicyLossConfig(clip_low=0.2, clip_high=0.2)
DUAL = ppo.PolicyLossConfig(clip_low=0.2, clip_high=0.2, dual_clip=3.0)


def objective_and_slope(ratio: Tensor, advantage: float, config: ppo.PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """The objective at each ratio [N], and its derivative with respect to the ratio [N].

    The policy has two actions. Action 0 had probability 0.1 when it was sampled and has ``0.1 * ratio`` now,
    so ``ratio`` must lie in (0, 10). One call per point, since the op returns the mean over its rows.
    """
    pairs = [_at(r, advantage, config) for r in ratio.double()]
    return torch.stack([value for value, _ in pairs]), torch.stack([slope for _, slope in pairs])


def _at(ratio: Tensor, advantage: float, config: ppo.PolicyLossConfig) -> tuple[Tensor, Tensor]:
    ratio = ratio.clone().requires_grad_()
    probability = 0.1 * ratio
    logits = torch.stack([probability, 1 - probability]).log()[None]
    out = ppo.policy_loss(
        logits,
        torch.zeros(1, dtype=torch.int64),
        torch.full((1,), 0.1, dtype=torch.float64).log(),
        torch.full((1,), advantage, dtype=torch.float64),
        torch.ones(1, dtype=torch.bool),
        config=config,
    )
    (slope,) = torch.autograd.grad(-out.loss, ratio)
    return -out.loss.detach(), slope


def draw(path: Path, points: int = 241) -> None:
    """Draw objective (top) and slope (bottom) for A = +1 (left) and A = -1 (right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratio = torch.linspace(0.02, 4.0, points, dtype=torch.float64)
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, sharey="row", layout="constrained")
    for column, (advantage, title) in enumerate(((1.0, "A = +1: a good action"), (-1.0, "A = -1: a bad one"))):
        plain = advantage * ratio
        value, slope = objective_and_slope(ratio, advantage, CLIP)
        top, bottom = axes[:, column]
        top.plot(ratio, plain, color="#b5b5b5", linestyle=":", label="r A, not clipped")
        top.plot(ratio, value, color="#1f6f8b", label="clipped, 0.8 to 1.2")
        bottom.plot(ratio, slope, color="#1f6f8b")
        if advantage < 0:
            dual_value, dual_slope = objective_and_slope(ratio, advantage, DUAL)
            top.plot(ratio, dual_value, color="#d98324", linestyle="--", label="and dual clip, c = 3")
            bottom.plot(ratio, dual_slope, color="#d98324", linestyle="--")
        top.plot([1.0], [advantage], "o", color="#333333", markersize=4)
        top.set_title(title, loc="left")
        top.legend(frameon=False, loc="upper right" if advantage < 0 else "lower right")
        bottom.set_xlabel("ratio r = pi / pi_old")
        for axis in (top, bottom):
            axis.axvspan(0.8, 1.2, color="#1f6f8b", alpha=0.08, linewidth=0)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("objective")
    axes[1, 0].set_ylabel("d objective / d r")
    figure.suptitle("The clip removes the reason to go further, never the reason to come back", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="directory of the picture")
    parser.add_argument("--points", type=int, default=241, help="ratios at which the op is evaluated")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.out / "clipped_objective.png"
    draw(path, args.points)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
