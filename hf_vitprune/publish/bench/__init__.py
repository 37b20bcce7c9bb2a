"""Latency and memory of models in every form, side by side."""

from .run import bench, bench_table, plot_bench

__all__ = ["bench", "bench_table", "plot_bench"]
