"""``hf-vitprune inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import ImageSizeOption, ModelArgument, say


def inspect(
    model: ModelArgument,
    image_size: ImageSizeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the layers to this file (png, svg or pdf) too.")] = None,
) -> None:
    """Show the layers of a model: sizes, parameters, multiply-adds. Reads its config, not its weights."""
    from rich.console import Console

    from hf_vitprune.cost import count
    from hf_vitprune.publish.block_report import plot_architecture
    from hf_vitprune.publish.report import human, layer_rows, layer_table
    from hf_vitprune.spec.origin import dense_of

    from .saved import load_architecture, load_config

    architecture = load_architecture(model)
    if plot is not None:
        plot_architecture(architecture, plot, image_size)
    cost = count(architecture, image_size)
    dense = count(dense_of(load_config(model), architecture.task), image_size)
    if as_json:
        record = {"model_type": architecture.model_type, "task": architecture.task, **cost._asdict()}
        record |= {"dense": dense._asdict(), "layers": layer_rows(architecture, image_size)}
        print(json.dumps(record))
        return
    Console().print(layer_table(architecture, image_size, title=f"{model} ({architecture.model_type})"))
    if cost != dense:
        say(
            f"Of the dense model's {human(dense.params)} parameters and {human(dense.macs)} multiply-adds, "
            f"{cost.params / dense.params:.1%} and {cost.macs / dense.macs:.1%} remain."
        )
