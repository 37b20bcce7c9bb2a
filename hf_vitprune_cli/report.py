"""``hf-vitprune report``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import ImageSizeOption, ModelArgument


def report(
    dense: ModelArgument,
    pruned: Annotated[list[str], typer.Argument(metavar="PRUNED...", help="Models that were made from it.")],
    image_size: ImageSizeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what every layer keeps to this file (png, svg or pdf) too.")
    ] = None,
) -> None:
    """Compare pruned models with the dense one: cost, and the sizes of every layer. Reads configs, not weights."""
    from rich.console import Console

    from hf_vitprune.cost import count
    from hf_vitprune.publish.report import comparison_table, layer_rows, layer_table, plot_removed

    from .saved import load_architecture

    architectures = {name: load_architecture(name) for name in (dense, *pruned)}
    whole = count(architectures[dense], image_size)
    rows = []
    for name, architecture in architectures.items():
        cost = count(architecture, image_size)
        shares = {"MACs kept": cost.macs / whole.macs, "parameters kept": cost.params / whole.params}
        rows.append({"name": name, "params": cost.params, "macs": cost.macs, **shares})
    if plot is not None:
        plot_removed({name: architectures[name] for name in pruned}, plot)
    if as_json:
        layers = {name: layer_rows(architecture, image_size) for name, architecture in architectures.items()}
        print(json.dumps([{**row, "layers": layers[str(row["name"])]} for row in rows]))
        return
    console = Console()
    console.print(comparison_table(rows))
    for name in pruned:
        console.print(layer_table(architectures[name], image_size, title=name))
