"""Accuracy without training: compensation and one-shot pruning on small trained models. See ``cli.py``."""
