"""Figures by matplotlib: made, marked and written in one way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .extras import need

#: colours that stay apart for the colour-blind, each at least 3:1 against white (after Okabe and Ito)
PALETTE = ("#0072b2", "#d55e00", "#00855f", "#a4508b", "#7a6a00", "#55606b")
#: a marker for each, for those who see none of them
MARKERS = ("o", "s", "^", "D", "v", "P")


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, of a size in inches, that belongs to no window.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    need("plots", "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure; the suffix of the path, which is given back, says the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def mark_stages(axes: Any, stages: Sequence[int]) -> None:
    """Lines between the stages of a model on the axis of its layers, and their names above; nothing for one stage."""
    starts = [i for i in range(len(stages)) if not i or stages[i] != stages[i - 1]]
    if len(starts) < 2:
        return
    for start, end in zip(starts, [*starts[1:], len(stages)], strict=True):
        if start:
            axes.axvline(start - 0.5, color="black", linewidth=0.6)
        axes.text(
            (start + end - 1) / 2,
            1.01,
            f"stage {stages[start]}" if end - start > 3 or not start else str(stages[start]),
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize="x-small",
        )
