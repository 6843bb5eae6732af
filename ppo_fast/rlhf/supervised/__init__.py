"""Supervised stages: SFT, reward model, DPO."""
