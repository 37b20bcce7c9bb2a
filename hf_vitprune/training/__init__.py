"""Training with pruning, and the way out of it."""
