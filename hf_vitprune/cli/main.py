"""The ``hf-vitprune`` command.

A command is a function given to ``app.command()``, of this file or of another. What is slow to import is imported
inside the functions, so that ``--help`` is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import ModelArgument, empty_output, load_architecture, load_config, make_app, model_class_of
from .convert import convert
from .latency import latency
from .prune import demo, prune

console = Console()
app = make_app("hf-vitprune", "Structured pruning of Hugging Face vision transformers.")


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options that every command has."""


def main() -> None:
    """Entry point of the console script."""
    app()


# ---------------------------------------------------------------------- commands
@app.command()
def inspect(
    model: ModelArgument,
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the layers to this file (png, svg or pdf) too.")] = None,
) -> None:
    """Show the layers of a model: sizes, parameters, multiply-adds. Reads its config, not its weights."""
    from ..cost import count
    from ..publish.block_report import plot_architecture
    from ..publish.report import human, layer_rows, layer_table
    from ..spec.architecture import Architecture

    architecture = load_architecture(model)
    if plot is not None:
        plot_architecture(architecture, plot, image_size)
    cost = count(architecture, image_size)
    dense = count(Architecture.dense(architecture.config, architecture.task), image_size)
    if as_json:
        record = {"model_type": architecture.model_type, "task": architecture.task, **cost._asdict()}
        record |= {"dense": dense._asdict(), "layers": layer_rows(architecture, image_size)}
        print(json.dumps(record))
        return
    console.print(layer_table(architecture, image_size, title=f"{model} ({architecture.model_type})"))
    if cost != dense:
        console.print(
            f"Of the dense model's {human(dense.params)} parameters and {human(dense.macs)} multiply-adds, "
            f"{cost.params / dense.params:.1%} and {cost.macs / dense.macs:.1%} remain.",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    native: Annotated[
        bool, typer.Option("--native", help="As a stock transformers model, which loads without hf_vitprune.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is in OUT.")] = False,
) -> None:
    """Save a model as safetensors, with its image processor's settings; refuses shapes that --native cannot hold."""
    import shutil

    from transformers.utils import cached_file

    from ..modeling.native import native_config, to_native

    architecture = load_architecture(model)
    if native:
        native_config(architecture)  # refuse before weights are fetched
    empty_output(out, force)
    loaded: Any = model_class_of(load_config(model)).from_pretrained(model)
    result = to_native(loaded) if native else loaded
    result.save_pretrained(out)
    settings = cached_file(model, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if settings is not None and Path(settings).parent.resolve() != out.resolve():
        shutil.copy(settings, out / "preprocessor_config.json")
    console.print(f"{type(result).__name__} saved in {out}", highlight=False, soft_wrap=True)


@app.command()
def card(
    model: ModelArgument,
    out: Annotated[Path | None, typer.Option("--out", help="File to write, for instance README.md.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it was pruned from.")] = None,
    license: Annotated[str | None, typer.Option(help="License, that of the base model as a rule.")] = None,
    repo_id: Annotated[str | None, typer.Option(help="Where the model will be on the Hub.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Write the model card of a saved model; prints it without --out."""
    import torch

    from ..publish.card import model_card

    config = load_config(model)
    if out is not None:
        empty_output(out, force)
    with torch.device("meta"):  # a card needs no weights
        skeleton = model_class_of(config)(config)
    hub_id = repo_id or (None if Path(model).exists() else model)
    text = str(model_card(skeleton, base_model=base_model, license=license, repo_id=hub_id))
    if out is None:
        print(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    console.print(f"card written to {out}", highlight=False, soft_wrap=True)


app.command()(convert)
app.command()(prune)
app.command()(latency)
app.command()(demo)

if __name__ == "__main__":
    main()
