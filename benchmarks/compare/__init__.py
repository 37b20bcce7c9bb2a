"""Pruning methods against each other: one dense model, one cost, one number of steps; see ``cli.py``."""
