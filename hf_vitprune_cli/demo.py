"""``hf-vitprune demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the pruned models.")] = Path("hf-vitprune-demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Train a small ViT on real digits, prune it by every method, save, load back, and print a table (3 minutes)."""
    from .digits import run_demo

    run_demo(output, seed)
