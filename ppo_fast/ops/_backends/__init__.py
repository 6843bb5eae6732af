"""Implementations of the ops: the same file names in each backend."""
