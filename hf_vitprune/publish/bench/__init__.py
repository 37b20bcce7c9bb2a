"""Latency and memory of models in every form, side by side."""

from .run import bench

__all__ = ["bench"]
