"""``hf-vitprune inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import ClassesOption, ForceOption, ImageSizeOption, ModelArgument, PartOption, empty_output, need_plots, say


def inspect(
    model: ModelArgument,
    image_size: ImageSizeOption = None,
    part: PartOption = None,
    classes: ClassesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the layers to this file (png, svg or pdf) too.")] = None,
    force: ForceOption = False,
) -> None:
    """Show the layers of a model, or of a tower in it: sizes, parameters, multiply-adds.

    Reads its config; its weights with --classes alone.
    """
    if plot is not None:
        empty_output(plot, force, model, file=True)
        need_plots()

    from rich.console import Console

    from hf_vitprune.cost import count
    from hf_vitprune.publish.block_report import plot_architecture
    from hf_vitprune.publish.report import human, layer_rows, layer_table
    from hf_vitprune.spec.architecture import dense_of

    from .saved import load_tower

    architecture, config = load_tower(model, part)
    if plot is not None:
        plot_architecture(architecture, plot, image_size)
    cost = count(architecture, image_size)
    dense = count(dense_of(config, architecture.task), image_size)
    accuracy = None
    if classes is not None:
        from .evaluated import accuracy_of_saved

        accuracy = accuracy_of_saved(model, classes)
    if as_json:
        record = {"model_type": architecture.model_type, "task": architecture.task, **cost._asdict()}
        record |= {"dense": dense._asdict(), "layers": layer_rows(architecture, image_size)}
        if accuracy is not None:
            record["zero_shot_accuracy"] = accuracy
        print(json.dumps(record))
        return
    Console().print(layer_table(architecture, image_size, title=f"{model} ({architecture.model_type})"))
    if cost != dense:
        say(
            f"Of the dense model's {human(dense.params)} parameters and {human(dense.macs)} multiply-adds, "
            f"{cost.params / dense.params:.1%} and {cost.macs / dense.macs:.1%} remain."
        )
    if accuracy is not None:
        say(f"Zero-shot accuracy on {classes}: {accuracy:.1%}.")
