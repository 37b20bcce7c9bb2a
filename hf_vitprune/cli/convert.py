"""``hf-vitprune convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InvalidConfigError


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pth file of SPViT's authors.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    base: Annotated[str, typer.Option(help="Dense model it was made from: folder or Hub id (for its config).")],
    layers: Annotated[Path, typer.Option(help="JSON file with the lists 'mixer' and 'mlp_hidden'.")],
    centre_column: Annotated[
        int | None, typer.Option(help="Column of the mixing tables for the centre: 4, or 0; by default found.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is in OUT.")] = False,
) -> None:
    """Turn a fine-tuned SPViT checkpoint into a folder that from_pretrained loads. Runs no code of the file."""
    from rich.console import Console

    from ..contrib.convert import convert_spvit_checkpoint
    from ..publish.report import layer_table
    from ..utils.checkpoint_file import read_checkpoint
    from .app import empty_output, load_config

    empty_output(out, force)
    lists = _lists(layers)
    config = load_config(base)
    model = convert_spvit_checkpoint(
        read_checkpoint(checkpoint), config, lists["mixer"], lists["mlp_hidden"], centre_column=centre_column
    )
    model.save_pretrained(out)
    console = Console()
    console.print(layer_table(model, title=checkpoint.name))
    console.print(f"saved to {out}", highlight=False, soft_wrap=True)


def _lists(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InvalidConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(k), list) for k in ("mixer", "mlp_hidden")):
        raise InvalidConfigError(
            f"{path} has the lists mixer and mlp_hidden, one entry a layer (Swin: a list a stage)"
        )
    return record
