"""PPO on a contextual bandit: what keeps a policy near the one that collected the data.

Eight contexts, ten arms, rewards N(mu[context, arm], 0.1^2). The policy is a table of logits, so every
expectation is exact and every figure can be checked by hand. Three objectives are compared:

    clip      the clipped surrogate, ratio kept in [0.8, 1.2]
    penalty   no clip; coef * KL(old || new) in the loss, coef doubled or halved to hold a target
    none      the plain surrogate ratio * advantage

    python examples/bandit.py               # prints a table and draws bandit.png
    python examples/bandit.py --out DIR
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import ppo_fast as ppo

MODES = ("clip", "penalty", "none")
TARGET_KL = 0.02  # nats per update, for the penalty


@dataclass(frozen=True)
class Settings:
    mode: str = "clip"  # one of MODES
    updates: int = 25
    batch: int = 512  # pulls per update
    epochs: int = 4  # steps on the whole batch
    lr: float = 0.1  # Adam; falls linearly to 0
    beta: float = 0.0  # weight of KL(pi || reference) in the loss; the reference is the uniform policy


LEASHED = Settings(updates=60, batch=2048, beta=0.1)


def stressed(mode: str) -> Settings:
    """Steps so large and so many that only the objective holds the policy back."""
    return Settings(mode, lr=0.5, epochs=20)


@dataclass(frozen=True)
class History:
    policy: Tensor  # [C, A] probabilities after the last update
    reward: list[float]  # expected reward after each update
    kl: list[float]  # KL(old || new) of each update, nats, mean over contexts


def make_bandit(seed: int = 0, contexts: int = 8, arms: int = 10) -> Tensor:
    """Mean rewards ``mu`` [C, A], uniform in [0, 1)."""
    return torch.rand(contexts, arms, generator=torch.Generator().manual_seed(seed))


def expected_reward(policy: Tensor, mu: Tensor) -> float:
    """Sum over arms of policy * mu, mean over contexts."""
    return float((policy * mu).sum(-1).mean())


def best_reward(mu: Tensor) -> float:
    """Expected reward of the policy that always pulls the best arm."""
    return float(mu.max(-1).values.mean())


def closed_form(mu: Tensor, beta: float) -> Tensor:
    """The maximizer of E[r] - beta * KL(pi || uniform): pi proportional to uniform * exp(mu / beta)."""
    return torch.softmax(mu / beta, dim=-1)


def train(mu: Tensor, settings: Settings, seed: int = 0) -> History:
    """Run PPO on the bandit with mean rewards ``mu`` [C, A]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros_like(mu, requires_grad=True)
    values = torch.zeros(mu.shape[0], requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.updates)
    coef, rewards, kls = 1.0, [], []
    for _ in range(settings.updates):
        old = logits.detach().log_softmax(-1)
        update(optimizer, logits, values, mu, settings, coef, generator)
        schedule.step()
        new = logits.detach().log_softmax(-1)
        kls.append(float((old.exp() * (old - new)).sum(-1).mean()))
        rewards.append(expected_reward(new.exp(), mu))
        coef *= 2.0 if kls[-1] > 1.5 * TARGET_KL else 0.5 if kls[-1] < TARGET_KL / 1.5 else 1.0
    return History(logits.detach().softmax(-1), rewards, kls)


def update(
    optimizer: torch.optim.Optimizer,
    logits: Tensor,
    values: Tensor,
    mu: Tensor,
    settings: Settings,
    penalty_coef: float,
    generator: torch.Generator,
) -> None:
    """Pull ``batch`` arms with the present policy, then take several epochs of steps on those pulls."""
    contexts = torch.arange(settings.batch) % mu.shape[0]
    counted = torch.ones(settings.batch, dtype=torch.bool)
    with torch.no_grad():
        arms = torch.multinomial(logits.softmax(-1)[contexts], 1, generator=generator).squeeze(-1)
        rewards = mu[contexts, arms] + 0.1 * torch.randn(settings.batch, generator=generator)
        old_logprobs = ppo.token_logprobs(logits[contexts], arms)
        advantages = rewards - values[contexts]
        if settings.beta == 0:  # whitening would change the exchange rate between reward and KL
            advantages = ppo.whiten(advantages, counted)
    config = loss_config(settings, penalty_coef)
    reference = torch.zeros_like(mu)[contexts] if settings.beta else None
    for _ in range(settings.epochs):
        actor = ppo.policy_loss(
            logits[contexts], arms, old_logprobs, advantages, counted, config=config, ref_logits=reference
        )
        critic = ppo.value_loss(values[contexts], rewards, counted)
        optimizer.zero_grad()
        (actor.loss + critic.loss).backward()
        optimizer.step()


def loss_config(settings: Settings, penalty_coef: float) -> ppo.PolicyLossConfig:
    """The objective of a mode: the clip range, or the penalty's coefficient, or neither."""
    clip = 0.2 if settings.mode == "clip" else None
    return ppo.PolicyLossConfig(
        clip_low=clip,
        clip_high=clip,
        penalty_coef=penalty_coef if settings.mode == "penalty" else 0.0,
        kl_coef=settings.beta,
        kl_estimator="full",
    )


def draw(calm: dict[str, History], stress: dict[str, History], best: float, path: Path) -> None:
    """Draw reward and KL per update, for the ordinary settings (left) and the stress settings (right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = dict(zip(MODES, ("#1f6f8b", "#d98324", "#8a8a8a"), strict=True))
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6), sharex=True, sharey="row", layout="constrained")
    for column, (title, runs) in enumerate((("lr 0.1, 4 epochs", calm), ("lr 0.5, 20 epochs", stress))):
        for mode, history in runs.items():
            updates = range(1, len(history.kl) + 1)
            share = [100 * reward / best for reward in history.reward]
            axes[0, column].plot(updates, share, color=colors[mode], label=mode)
            axes[1, column].plot(updates, history.kl, color=colors[mode], label=mode)
        axes[0, column].set_title(title, loc="left")
        axes[1, column].set(yscale="log", ylim=(1e-4, 20), xlabel="update")
    axes[0, 0].set_ylabel("expected reward\n(% of the best)")
    axes[1, 0].set_ylabel("KL(old || new)\n(nats per update)")
    axes[0, 0].legend(frameon=False, loc="lower right")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("The clip and the penalty bound the step; without them the policy jumps", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bandit"), help="directory of the picture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)

    mu = make_bandit(args.seed)
    best = best_reward(mu)
    calm = {mode: train(mu, Settings(mode), args.seed) for mode in MODES}
    stress = {mode: train(mu, stressed(mode), args.seed) for mode in MODES}
    print("mode      reward (% of best)   max KL   max KL at lr 0.5, 20 epochs")
    for mode in MODES:
        share = 100 * calm[mode].reward[-1] / best
        print(f"{mode:8} {share:19.1f} {max(calm[mode].kl):8.3f} {max(stress[mode].kl):29.2f}")
    optimum = expected_reward(closed_form(mu, LEASHED.beta), mu)
    reached = train(mu, LEASHED, args.seed).reward[-1]
    print(f"\nWith KL to the uniform policy (beta {LEASHED.beta}) the optimum is exp(mu / beta), normalized:")
    print(f"expected reward {optimum:.4f}, reached {reached:.4f}")
    draw(calm, stress, best, args.out / "bandit.png")
    print(f"\nwrote {args.out / 'bandit.png'}")


if __name__ == "__main__":
    main()
