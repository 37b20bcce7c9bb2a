"""``hf-vitprune report``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .app import (
    ClassesOption,
    ForceOption,
    ImageSizeOption,
    ModelArgument,
    PartOption,
    empty_output,
    grouped,
    need_plots,
    say,
)

_page = partial(grouped, "A page")


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
    out: Annotated[
        Path | None, _page("Write a page (HTML) too: sizes, latency, and what the options below add to it.")
    ] = None,
    images: Annotated[Path | None, _page("Folder of images: which predictions or nearest neighbours changed.")] = None,
    data: Annotated[str | None, _page("Labelled images (as --data of prune): accuracy, and the same.")] = None,
    scores: Annotated[Path | None, _page("One-shot scores of the dense model: cost against error.")] = None,
    batch_size: Annotated[int, _page("Images a forward pass.", min=1)] = 8,
    rounds: Annotated[int, _page("How often every model is timed.", min=1)] = 15,
    force: ForceOption = False,
) -> None:
    """Compare pruned models with the dense one: cost, and the sizes of every layer.

    Reads configs, and what evaluate left beside them; weights with --classes and --out alone.
    """
    if out is None and not (images is None and data is None and scores is None):
        raise typer.BadParameter("--images, --data and --scores are for a page: add --out report.html")
    if images is not None and data is not None:
        raise typer.BadParameter("--images is without labels and --data with them: give one")
    if out is not None:
        empty_output(out, force, dense, *pruned, images, data, scores, file=True)
    if plot is not None:
        empty_output(plot, force, dense, *pruned, file=True)
        need_plots()
    from rich.console import Console

    from hf_vitprune.cost import count
    from hf_vitprune.publish.block_report import plot_kept
    from hf_vitprune.publish.report import comparison_table, layer_rows, layer_table

    from .saved import load_tower, saved_metrics

    architectures = {name: load_tower(name, part)[0] for name in (dense, *pruned)}
    whole = count(architectures[dense], image_size)
    metrics = {name: saved_metrics(name) for name in architectures}
    if classes is not None:
        from .evaluated import accuracy_of_saved

        for name, found in metrics.items():
            found["zero-shot accuracy"] = accuracy_of_saved(name, classes)
    rows = []
    for name, architecture in architectures.items():
        cost = count(architecture, image_size)
        shares = {"MACs kept": cost.macs / whole.macs, "parameters kept": cost.params / whole.params}
        rows.append({"name": name, **metrics[name], "params": cost.params, "macs": cost.macs, **shares})
    if plot is not None:
        plot_kept({name: architectures[name] for name in pruned}, plot)
    if out is not None:
        from .page import report_page

        report_page(
            [dense, *pruned],
            out,
            images=images,
            data=data,
            scores=scores,
            image_size=image_size,
            part=part,
            batch_size=batch_size,
            rounds=rounds,
            metrics=metrics,
        )
    if as_json:
        layers = {name: layer_rows(architecture, image_size) for name, architecture in architectures.items()}
        print(json.dumps([{**row, "layers": layers[str(row["name"])]} for row in rows]))
        return
    console = Console()
    console.print(comparison_table(rows))
    for name in pruned:
        console.print(layer_table(architectures[name], image_size, title=name))
    if out is not None:
        say(f"page written to {out}")
