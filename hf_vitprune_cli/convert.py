"""``hf-vitprune convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import ForceOption, OutArgument, empty_output, say


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A .pth file of SPViT's authors.")],
    out: OutArgument,
    base: Annotated[str, typer.Option(help="Dense model it was made from: folder or Hub id (for its config).")],
    layers: Annotated[Path, typer.Option(help="JSON file with the lists 'mixer' and 'mlp_hidden'.")],
    centre_column: Annotated[
        int | None, typer.Option(help="Column of the mixing tables for the centre: 4, or 0; by default found.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Turn a fine-tuned SPViT checkpoint into a folder that from_pretrained loads. Runs no code of the file."""
    empty_output(out, force, checkpoint, base, layers)
    lists = _lists(layers)

    from rich.console import Console

    from hf_vitprune.contrib.convert import convert_spvit_checkpoint
    from hf_vitprune.publish.report import layer_table
    from hf_vitprune.utils.checkpoint_file import read_checkpoint

    from .saved import load_config

    config = load_config(base)
    model = convert_spvit_checkpoint(
        read_checkpoint(checkpoint), config, lists["mixer"], lists["mlp_hidden"], centre_column=centre_column
    )
    model.save_pretrained(out)
    Console().print(layer_table(model, title=checkpoint.name))
    say(f"saved to {out}")


def _lists(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}", param_hint="--layers") from error
    if not isinstance(record, dict) or not all(isinstance(record.get(k), list) for k in ("mixer", "mlp_hidden")):
        raise typer.BadParameter(
            f"{path} has the lists mixer and mlp_hidden, one entry a layer (Swin: a list a stage)",
            param_hint="--layers",
        )
    return record
