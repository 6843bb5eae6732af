import torch

import ppo_fast as ppo

torch.manual_seed(0)
B, T, V, D = 64, 16, 50, 32  # sequences, response tokens, vocabulary, width
policy, critic = torch.nn.Linear(D, V), torch.nn.Linear(D, 1)  # your models
optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=1e-2)
config = ppo.PolicyLossConfig(clip_low=0.2, clip_high=0.28, ent_coef=0.003)

for update in range(30):
    hidden = torch.randn(B, T, D)  # row t: what the backbone makes of all before token t
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))  # True: a token the policy chose
    with torch.no_grad():
        tokens = torch.distributions.Categorical(logits=policy(hidden)).sample()
        old_logprobs = ppo.token_logprobs(policy(hidden), tokens, mask=mask)
        old_values = critic(hidden).squeeze(-1)
        rewards = (tokens % 2 == 0).float()  # your reward; here: even tokens are good
        advantages, returns = ppo.gae(rewards, old_values, mask, gamma=0.9, lam=0.95)
        advantages = ppo.whiten(advantages, mask)
    for _ in range(4):
        actor = ppo.policy_loss(policy(hidden), tokens, old_logprobs, advantages, mask, config=config)
        value = ppo.value_loss(critic(hidden).squeeze(-1), returns, mask, old_values=old_values, clip=0.2)
        optimizer.zero_grad()
        (actor.loss + 0.5 * value.loss).backward()
        optimizer.step()
    share, kl = ppo.masked_mean(rewards, mask), actor.metrics["approx_kl"]
    print(f"update {update + 1:2}  even tokens {share:.2f}  approx_kl {kl:.4f}")
