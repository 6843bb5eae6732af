"""The memory of a run by item and phase, before the run: `ppo-fast plan`, and what `train` prints first."""
