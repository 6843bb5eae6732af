"""PPO, in the order in which the data flows: rollout, rewards, advantages, update, metrics."""
