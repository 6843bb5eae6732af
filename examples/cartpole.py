"""PPO on CartPole in one file: a gymnasium environment, the ops, and nothing between them.

Rollouts are time-major [T, B], as environments give them; the ops take `x.T` without a copy. A state that ends an
episode early, by the time limit, still has a value: it is added to the reward, and `dones` cuts the episode there.

    pip install gymnasium
    python examples/cartpole.py
"""

import gymnasium as gym
import torch
from torch import nn

import ppo_fast as ppo

T, B, GAMMA, UPDATES = 64, 16, 0.98, 40  # steps per rollout, environments
torch.manual_seed(0)
torch.set_num_threads(1)
same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
envs = gym.make_vec("CartPole-v1", num_envs=B, vectorization_mode="sync", vector_kwargs=same_step)
D, A = envs.single_observation_space.shape[0], int(envs.single_action_space.n)


def mlp(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


policy, critic = mlp(A), mlp(1)
optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=2e-3)
config = ppo.PolicyLossConfig(clip_low=0.2, clip_high=0.2, ent_coef=0.01)
state = torch.as_tensor(envs.reset(seed=0)[0])

for update in range(UPDATES):
    states, actions, logprobs, values = (
        torch.empty(T, B, D),
        torch.empty(T, B).long(),
        torch.empty(T, B),
        torch.empty(T, B),
    )
    rewards, dones = torch.empty(T, B), torch.empty(T, B, dtype=torch.bool)
    with torch.no_grad():
        for t in range(T):
            logits = policy(state)
            states[t], values[t] = state, critic(state).squeeze(-1)
            actions[t] = torch.distributions.Categorical(logits=logits).sample()
            logprobs[t] = ppo.token_logprobs(logits, actions[t])
            state, reward, terminated, truncated, info = envs.step(actions[t].numpy())
            state, rewards[t] = torch.as_tensor(state), torch.as_tensor(reward).float()
            dones[t] = torch.as_tensor(terminated | truncated)
            for b in truncated.nonzero()[0]:
                rewards[t, b] += GAMMA * critic(torch.as_tensor(info["final_obs"][b])).item()
        bootstrap = critic(state).squeeze(-1)
        advantages, returns = ppo.gae(rewards.T, values.T, gamma=GAMMA, lam=0.95, bootstrap=bootstrap, dones=dones.T)
    advantages, returns = ppo.whiten(advantages, None).T, returns.T
    for _ in range(4):
        for rows in torch.randperm(T * B).chunk(4):
            x, chosen = states.flatten(0, 1)[rows], actions.flatten()[rows]
            old, advantage = logprobs.flatten()[rows], advantages.flatten()[rows]
            actor = ppo.policy_loss(policy(x), chosen, old, advantage, None, config=config)
            value = ppo.value_loss(critic(x).squeeze(-1), returns.flatten()[rows], None)
            optimizer.zero_grad()
            (actor.loss + value.loss).backward()
            nn.utils.clip_grad_norm_([*policy.parameters(), *critic.parameters()], 0.5)
            optimizer.step()
    length = T * B / max(1, int(dones.sum()))
    print(f"update {update + 1:2}  steps per episode {length:6.1f}  approx_kl {actor.metrics['approx_kl']:.4f}")
