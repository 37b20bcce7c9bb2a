"""Figures of a pruning run: cost and gates against step, and predicted against measured latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..methods.nvit.groups import Moment
from ..utils.figures import PALETTE, new_figure, save_figure
from .block_report import COLOURS, panels, style


def plot_run(
    runs: Mapping[str, Sequence[Moment]] | Sequence[Moment], path: str | Path, target: float | None = None
) -> Path:
    """Draw how the cost came down: optimizer steps to the right, share of the unpruned model's cost upwards.

    Args:
        runs: what ``pruning_model.method.moments()`` of NViT gives, or several of them by name.
        path: file to write; its suffix says the format (png, svg, pdf).
        target: drawn as a line.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    named = runs if isinstance(runs, Mapping) else {"": runs}
    figure = new_figure(4.5, 3.2)
    panel: Any = figure.subplots()
    for i, (name, moments) in enumerate(named.items()):
        steps, ratios = [moment.step for moment in moments], [moment.ratio for moment in moments]
        panel.step(steps, ratios, where="post", linewidth=1.2, markersize=3, label=name or "cost", **style(i))
    if target is not None:
        panel.axhline(target, color="grey", linewidth=0.8, linestyle="--", label=f"target, {target:g}")
    panel.set(xlabel="optimizer step", ylabel="share of the dense cost that is left", ylim=(0, 1.03))
    panel.grid(alpha=0.3)
    if any(named) or target is not None:
        panel.legend(fontsize="small")
    return save_figure(figure, path)


def plot_gates(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw how the gates of a search (SPViT) moved: a panel a layer, the chance of each to be on against the step.

    Args:
        log_history: ``trainer.state.log_history`` of the search.
        path: file to write; its suffix says the format (png, svg, pdf).

    Raises:
        ValueError: no gates were logged: the run was none of a search, or had no ``logging_steps``.
        MissingExtraError: matplotlib is not installed.
    """
    rows = [row for row in log_history if any(key.startswith("gate_layer") for key in row)]
    if not rows:
        raise ValueError("the log has no gates: train a search with logging_strategy='steps'")
    keys = [key.removeprefix("gate_layer").split("_") for key in rows[0] if key.startswith("gate_layer")]
    layers = sorted({int(layer) for layer, _ in keys})
    figure, axes, first = panels(len(layers), 4, 2.3, 1.9)
    steps = [row["step"] for row in rows]
    for panel, layer in zip(axes, layers, strict=True):
        for kind, colour in COLOURS.items():
            key = f"gate_layer{layer}_{kind.lower()}"
            if key in rows[0]:
                colour = "#3d3d3d" if kind == "MLP" else colour  # its mean: a bar's grey would not be seen
                panel.plot(steps, [row[key] for row in rows], color=colour, linewidth=1.2, label=kind)
        panel.axhline(0.5, color="grey", linewidth=0.6, linestyle="--", label="on above, off below")
        panel.set_title(f"layer {layer}", fontsize="small")
        panel.set(ylim=(0, 1))
        panel.grid(alpha=0.3)
    first[-1].set(xlabel="optimizer step", ylabel="chance to be on")
    shown = {line.get_label(): line for panel in axes for line in panel.get_legend_handles_labels()[0]}
    figure.legend(handles=shown.values(), fontsize="x-small", loc="outside lower center", ncols=min(3, len(shown)))
    return save_figure(figure, path)


def plot_predictions(predicted: Sequence[float], measured: Sequence[float], path: str | Path) -> Path:
    """Draw predicted against measured latency, one point a model, and the line where both agree.

    Args:
        predicted: seconds a batch, as ``LatencyTable.predict`` gives.
        measured: of the same models, as ``measure_speed`` gives.
        path: file to write; its suffix says the format (png, svg, pdf).

    Raises:
        ValueError: the two are of unequal length, or empty.
        MissingExtraError: matplotlib is not installed.
    """
    if len(predicted) != len(measured) or not len(predicted):
        raise ValueError(f"{len(predicted)} predictions and {len(measured)} measurements: one of each for every model")
    figure = new_figure(3.6, 3.4)
    panel: Any = figure.subplots()
    highest = 1e3 * max(*predicted, *measured) * 1.08
    panel.plot([0, highest], [0, highest], color="grey", linewidth=0.8, label="predicted as measured")
    panel.scatter([1e3 * s for s in measured], [1e3 * s for s in predicted], s=16, label="a model", color=PALETTE[0])
    panel.set(xlabel="measured (ms)", ylabel="predicted (ms)", xlim=(0, highest), ylim=(0, highest), aspect="equal")
    panel.grid(alpha=0.3)
    panel.legend(fontsize="small")
    return save_figure(figure, path)
