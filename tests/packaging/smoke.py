"""Run the ops of an installed package in a process of its own: ``python smoke.py native`` or ``python smoke.py torch``.

The argument says what the package was built with: the C++ extension, or no compiler. The script needs torch and the
package, no test tools, so that it tests a wheel in any environment.
"""

import sys

import torch

import ppo_fast as ppo

OPS = ("token_logprobs", "token_stats", "policy_loss", "value_loss", "gae")


def losses(backend: str) -> list[torch.Tensor]:
    """Losses, gradients and advantages of one batch, computed by `backend`."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, 301, generator=generator).requires_grad_()
    targets = torch.randint(301, (6, 9), generator=generator)
    rewards, values = torch.randn(2, 6, 9, generator=generator)
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 9, 0, 7])[:, None]
    advantages, returns = ppo.gae(rewards, values, mask, backend=backend)
    old = ppo.token_logprobs(logits.detach(), targets, mask=mask, backend=backend) - 0.1
    policy = ppo.policy_loss(logits, targets, old, advantages, mask, backend=backend)
    policy.loss.backward()
    value = ppo.value_loss(values, returns, mask, old_values=values + 0.3, clip=0.2, backend=backend)
    stats = ppo.token_stats(logits.detach(), targets, mask=mask, backend=backend)
    return [advantages, returns, old, policy.loss.detach(), logits.grad, value.loss, stats.entropy]


def main(built_with: str) -> None:
    states = ppo.backends()
    reasons = {op: states[op]["native"] for op in OPS}
    if built_with == "native":
        assert set(reasons.values()) == {"ok"}, reasons
        torch.set_num_threads(2)
        for ours, theirs in zip(losses("native"), losses("torch"), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    else:
        assert all(reason.startswith("the extension is not built: ") for reason in reasons.values()), reasons
        assert {states[op]["auto"] for op in OPS} == {"torch"}
        losses("torch")
    print(f"ppo_fast {ppo.__version__} ({built_with}) with torch {torch.__version__}: {ppo.__path__[0]}")


if __name__ == "__main__":
    main(sys.argv[1])
