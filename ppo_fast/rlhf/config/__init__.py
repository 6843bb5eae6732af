"""Configs: what a run is."""
