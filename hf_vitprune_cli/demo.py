"""``hf-vitprune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import ForceOption, empty_output


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pruned models.")] = Path("hf-vitprune-demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    force: ForceOption = False,
) -> None:
    """Train a small ViT on real digits, prune it by every method, save, load back, and print a table (3 minutes)."""
    empty_output(output, force)

    from .digits import run_demo

    run_demo(output, seed)
