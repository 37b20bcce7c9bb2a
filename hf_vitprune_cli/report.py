"""``hf-vitprune report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import ClassesOption, ForceOption, ImageSizeOption, ModelArgument, PartOption, empty_output


def report(
    dense: ModelArgument,
    pruned: Annotated[list[str], typer.Argument(metavar="PRUNED...", help="Models that were made from it.")],
    image_size: ImageSizeOption = None,
    part: PartOption = None,
    classes: ClassesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what every layer keeps to this file (png, svg or pdf) too.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Compare pruned models with the dense one: cost, and the sizes of every layer.

    Reads configs; weights with --classes alone.
    """
    if plot is not None:
        empty_output(plot, force, dense, *pruned, file=True)

    from rich.console import Console

    from hf_vitprune.cost import count
    from hf_vitprune.publish.block_report import plot_kept
    from hf_vitprune.publish.layers import layer_rows
    from hf_vitprune.publish.report import comparison_table, layer_table

    from .saved import load_architecture

    architectures = {name: load_architecture(name, part) for name in (dense, *pruned)}
    whole = count(architectures[dense], image_size)
    accuracies: dict[str, float] = {}
    if classes is not None:
        from .zero_shot import accuracy_of_saved

        accuracies = {name: accuracy_of_saved(name, classes) for name in architectures}
    rows = []
    for name, architecture in architectures.items():
        cost = count(architecture, image_size)
        shares = {"MACs kept": cost.macs / whole.macs, "parameters kept": cost.params / whole.params}
        zero_shot = {"zero-shot accuracy": accuracies[name]} if accuracies else {}
        rows.append({"name": name, **zero_shot, "params": cost.params, "macs": cost.macs, **shares})
    if plot is not None:
        plot_kept({name: architectures[name] for name in pruned}, plot)
    if as_json:
        layers = {name: layer_rows(architecture, image_size) for name, architecture in architectures.items()}
        print(json.dumps([{**row, "layers": layers[str(row["name"])]} for row in rows]))
        return
    console = Console()
    console.print(comparison_table(rows))
    for name in pruned:
        console.print(layer_table(architectures[name], image_size, title=name))
