"""VTAB-1k: nineteen small classification tasks to adapt, prune and compare on. ``python -m benchmarks.vtab``."""
