"""Figures: accuracy against throughput; and for one adapted model, what every layer knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from hf_vitprune.utils.figures import new_figure, save_figure

from .report import Row, at
from .settings import LAST


def points_of(rows: Sequence[Row]) -> tuple[list[str], list[tuple[str, float, float]]]:
    """(tasks that every row has, (name, throughput ratio, accuracy) of every row as means over them)."""
    common = [task for task in rows[0].records if all(task in row.records for row in rows)]
    speed, accuracy = at("results", LAST, "cost", "speedup"), at("results", LAST, "accuracy")
    points = []
    for row in rows:
        values = [(row.mean(task, speed), row.mean(task, accuracy)) for task in common]
        pairs = [(x, y) for x, y in values if x is not None and y is not None]
        if pairs:
            points.append((f"{row.peft}, {row.pruning}", *(fmean(column) for column in zip(*pairs, strict=True))))
    return common, points


def plot_tradeoff(rows: Sequence[Row], path: Path) -> Path:
    """Accuracy (last epoch) against throughput, a point an adaptation and pruning."""
    common, points = points_of(rows)
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for name, speed, accuracy in points:
        marker = "o" if name.endswith(", none") else "s"
        axes.plot(speed, 100 * accuracy, marker=marker, linestyle="", label=name)
    axes.set(
        xlabel="throughput / that of the unpruned model",
        ylabel="accuracy (%)",
        title=f"mean of {len(common)} tasks" if len(common) > 3 else ", ".join(common) or "no task that all have",
    )
    axes.grid(alpha=0.3)
    if points:
        axes.legend(fontsize="small")
    return save_figure(figure, path)


def plot_layers(
    title: str,
    accuracies: Mapping[int, float],
    scores: Mapping[int, float],
    threshold: float | None,
    correlation: float | None,
    path: Path,
) -> Path:
    """Probe accuracy and silhouette coefficient against depth, with SLS's threshold and Spearman's correlation."""
    figure = new_figure(6.5, 4)
    left = figure.subplots()
    right = left.twinx()
    (line,) = left.plot(list(accuracies), [100 * v for v in accuracies.values()], "o-", color="tab:blue")
    (other,) = right.plot(list(scores), list(scores.values()), "s--", color="tab:orange")
    handles, names = [line, other], ["linear probe", "silhouette coefficient"]
    if threshold is not None:
        handles.append(right.axhline(threshold, color="tab:red", linewidth=1, linestyle=":"))
        names.append("threshold of SLS")
    left.set(xlabel="layer", ylabel="test accuracy of a linear probe (%)")
    right.set_ylabel("silhouette coefficient")
    left.set_title(title if correlation is None else f"{title}; rank correlation {correlation:.2f}")
    left.legend(handles, names, fontsize="small", loc="lower right")
    left.grid(alpha=0.3)
    return save_figure(figure, path)


def plot_maps(
    title: str, maps: Mapping[int, np.ndarray], labels: np.ndarray, scores: Mapping[int, float], path: Path
) -> Path:
    """The t-SNE map of every layer (from 1): (images, 2) in [0, 1], coloured by class, and its score above."""
    columns = min(len(maps), 4)
    lines = -(-len(maps) // columns)
    figure = new_figure(2.6 * columns, 2.7 * lines)
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, (number, points) in zip(panels.flat, maps.items(), strict=False):
        panel.scatter(points[:, 0], points[:, 1], c=labels, cmap="nipy_spectral", s=3, linewidths=0)
        panel.set_title(f"layer {number}: {scores[number]:.2f}", fontsize="small")
    figure.suptitle(title)
    return save_figure(figure, path)
