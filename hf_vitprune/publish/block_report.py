"""A figure of what every block of a model mixes its tokens with, and where its multiply-adds go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..cost.blocks import block_macs
from ..spec.architecture import Architecture
from ..spec.origin import dense_of
from .report import new_figure, save_figure

#: colour of every mixer in figures, MLPs included
COLOURS = {
    "attention": "#4269d0",
    "conv3x3": "#ff725c",
    "conv1x1": "#efb118",
    "identity": "#6cc5b0",
    "none": "#9c9c9c",
    "MLP": "#d5d5d5",
}


def plot_architecture(model: Any, path: str | Path, image_size: int | tuple[int, int] | None = None) -> Path:
    """Draw every block: a bar of its multiply-adds, the mixer in the colour of its kind, the MLP with its width.

    The outlines are the same blocks of the dense model, where there are as many.

    Args:
        model: a model or an Architecture.
        path: file to write; its suffix says the format (png, svg, pdf).
        image_size: side, or (height, width), in pixels; the config's by default.

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    architecture = model if isinstance(model, Architecture) else Architecture.of(model)
    dense = dense_of(architecture.config, architecture.task)
    bars = block_macs(architecture, image_size)
    figure = new_figure(max(4.0, 0.55 * len(bars) + 1.5), 3.4)
    axes = figure.subplots()
    for i, ((mixer, mlp), shape) in enumerate(zip(bars, architecture.layers, strict=True)):
        axes.bar(i, mixer / 1e6, color=COLOURS[shape.mixer])
        axes.bar(i, mlp / 1e6, bottom=mixer / 1e6, color=COLOURS["MLP"])
        axes.annotate(str(shape.mlp), (i, (mixer + mlp) / 1e6), ha="center", va="bottom", fontsize="x-small")
        if mixer == 0:  # nothing to see: the kind is written at the foot of the bar
            axes.plot(i, 0, marker="s", color=COLOURS[shape.mixer], clip_on=False, zorder=3)
    if architecture.depths == dense.depths and len(bars) == len(dense.layers):
        full = [sum(pair) / 1e6 for pair in block_macs(dense, image_size)]
        axes.bar(range(len(full)), full, fill=False, edgecolor="black", linewidth=0.5, linestyle=":")
    stages = architecture.stages
    for i in range(1, len(stages)):
        if stages[i] != stages[i - 1]:
            axes.axvline(i - 0.5, color="black", linewidth=0.5)
    kinds = [kind for kind in COLOURS if kind == "MLP" or any(s.mixer == kind for s in architecture.layers)]
    handles = [axes.bar(0, 0, color=COLOURS[kind], label=kind) for kind in kinds]
    axes.legend(handles=handles, fontsize="small", ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes.set(xlabel="layer", ylabel="million multiply-adds", xticks=range(len(bars)))
    return save_figure(figure, path)
