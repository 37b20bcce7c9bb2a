"""Figures of layers: what each keeps; what it mixes its tokens with, and where its multiply-adds go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..cost.closed_form import block_macs
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture, dense_of
from ..spec.units import layer_sizes
from ..utils.figures import MARKERS, PALETTE, mark_stages, new_figure, save_figure
from .layers import kept_shares

#: colour of every mixer in figures, MLPs included
COLOURS = {
    "attention": "#4269d0",
    "conv3x3": "#ff725c",
    "conv1x1": "#efb118",
    "identity": "#6cc5b0",
    "none": "#9c9c9c",
    "MLP": "#d5d5d5",
}
#: what legends say where the kind's name alone would not do
LABELS = {"MLP": "MLP, its neurons above", "none": "no mixer"}


def plot_kept(subjects: Any, path: str | Path) -> Path:
    """Draw what share of every layer stays: one panel a unit, layers from left to right, stages marked.

    Args:
        subjects: a plan, an architecture or a model, or several of them by name.
        path: file to write; its suffix says the format (png, svg, pdf).

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    named = subjects if isinstance(subjects, Mapping) else {"": subjects}
    shares = {name: kept_shares(subject) for name, subject in named.items()}
    titles = layer_sizes()
    units = [unit for unit in titles if any(unit in rows for rows in shares.values())]
    columns = min(len(units), 4)
    lines = -(-len(units) // columns)
    figure = new_figure(3.2 * columns, 2.6 * lines + 0.6)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    stages = max((_stages(subject) for subject in named.values()), key=len)
    for panel in axes.flat[len(units) :]:
        panel.set_visible(False)
    for unit, panel in zip(units, axes.flat, strict=False):
        for i, (name, rows) in enumerate(shares.items()):
            style = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
            if unit in rows:
                kept = [100 * share for share in rows[unit]]
                panel.plot(kept, markersize=4, linewidth=1, label=name, **style)
        panel.set_title(titles[unit], fontsize="medium", pad=16 if len({*stages}) > 1 else 6)
        panel.set(xlabel="layer, bottom to top", ylim=(-3, 105))
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
        mark_stages(panel, stages)
    for row in axes:
        row[0].set_ylabel("share kept (%)")
    figure.suptitle("Share that every layer keeps of the dense model's units (0: removed)")
    if any(named):
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=min(3, len(named)))
    return save_figure(figure, path)


def _stages(subject: Any) -> list[int]:
    """The stage of every layer that :func:`kept_shares` has a share of."""
    if isinstance(subject, PruningPlan):
        return subject.source.stages
    return (subject if isinstance(subject, Architecture) else Architecture.of(subject)).stages


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
    figure = new_figure(max(4.8, 0.55 * len(bars) + 1.5), 3.6)
    axes = figure.subplots()
    handles: list[Any] = []
    for i, ((mixer, mlp), shape) in enumerate(zip(bars, architecture.layers, strict=True)):
        axes.bar(i, mixer / 1e6, color=COLOURS[shape.mixer])
        axes.bar(i, mlp / 1e6, bottom=mixer / 1e6, color=COLOURS["MLP"])
        axes.annotate(str(shape.mlp), (i, (mixer + mlp) / 1e6), ha="center", va="bottom", fontsize="x-small")
        if mixer == 0:  # nothing to see: the kind is written at the foot of the bar
            axes.plot(i, 0, marker="s", color=COLOURS[shape.mixer], clip_on=False, zorder=3)
    if architecture.depths == dense.depths and len(bars) == len(dense.layers):
        full = [sum(pair) / 1e6 for pair in block_macs(dense, image_size)]
        outline = {"fill": False, "edgecolor": "black", "linewidth": 0.5, "linestyle": ":"}
        handles.append(axes.bar(range(len(full)), full, label="the same layer, dense", **outline))
    mark_stages(axes, architecture.stages)
    kinds = [kind for kind in COLOURS if kind == "MLP" or any(s.mixer == kind for s in architecture.layers)]
    handles += [axes.bar(0, 0, color=COLOURS[kind], label=LABELS.get(kind, kind)) for kind in kinds]
    figure.legend(handles=handles, fontsize="small", ncols=3, loc="outside lower center")
    axes.set(xlabel="layer, bottom to top", ylabel="million multiply-adds", xticks=range(len(bars)))
    return save_figure(figure, path)
