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
from .report import size_at, sizes_of

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


def style(number: int) -> dict[str, str]:
    """Colour and marker of a curve."""
    return {"color": PALETTE[number % len(PALETTE)], "marker": MARKERS[number % len(MARKERS)]}


def panels(number: int, most: int, width: float, height: float) -> tuple[Any, list[Any], Any]:
    """(figure, so many panels with common axes, the first of every row), at the most so many in a row."""
    columns = min(number, most)
    lines = -(-number // columns)
    figure = new_figure(width * columns, height * lines + 0.6)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel in axes.flat[number:]:
        panel.set_axis_off()
    return figure, list(axes.flat[:number]), axes[:, 0]


def places(architecture: Architecture) -> list[tuple[int, int]]:
    """(stage, position in the stage) of every layer."""
    stages = architecture.stages
    return [(stage, stages[:i].count(stage)) for i, stage in enumerate(stages)]


def kept_shares(subject: PruningPlan | Architecture | Any) -> dict[str, list[float]]:
    """Unit -> share of it that each layer keeps, bottom to top.

    A plan is compared with the model that it is for, and removed layers keep 0. An architecture or a model does not
    know which layers are gone: each of its own is compared with a dense one. ``attention_in`` and ``mlp_in`` are
    there only where a layer has them.
    """
    if isinstance(subject, PruningPlan):
        architecture, reference = subject.architecture, subject.source
        positions = [entry.index for entry in subject.layers]
    else:
        architecture = Architecture.given(subject)
        reference = dense_of(architecture.config, architecture.task)
        theirs = places(reference)
        positions = [theirs.index(place) for place in places(architecture)]
    shares = {}
    for name in layer_sizes():
        row, seen = [0.0] * len(reference.layers), not name.endswith("_in")
        for i, position in enumerate(positions):
            seen |= sizes_of(architecture, i)[name] is not None
            full = size_at(reference, position, name)
            row[position] = size_at(architecture, i, name) / full if full else 0.0
        if seen:
            shares[name] = row if isinstance(subject, PruningPlan) else [row[position] for position in positions]
    return shares


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
    units = {unit: title for unit, title in layer_sizes().items() if any(unit in rows for rows in shares.values())}
    figure, axes, first = panels(len(units), 4, 3.2, 2.6)
    stages = max((_stages(subject) for subject in named.values()), key=len)
    for (unit, title), panel in zip(units.items(), axes, strict=True):
        for i, (name, rows) in enumerate(shares.items()):
            if unit in rows:
                panel.plot([100 * share for share in rows[unit]], markersize=4, linewidth=1, label=name, **style(i))
        panel.set_title(title, fontsize="medium", pad=16 if len({*stages}) > 1 else 6)
        panel.set(xlabel="layer, bottom to top", ylim=(-3, 105))
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
        mark_stages(panel, stages)
    for panel in first:
        panel.set_ylabel("share kept (%)")
    figure.suptitle("Share that every layer keeps of the dense model's units (0: removed)")
    if any(named):
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=min(3, len(named)))
    return save_figure(figure, path)


def _stages(subject: Any) -> list[int]:
    """The stage of every layer that :func:`kept_shares` has a share of."""
    return subject.source.stages if isinstance(subject, PruningPlan) else Architecture.given(subject).stages


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
    architecture = Architecture.given(model)
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
