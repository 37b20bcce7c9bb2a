"""The ``hf-vitprune`` command."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import make_app
from .bench import bench
from .card import card
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .latency import latency
from .prune import prune
from .report import report

app = make_app("hf-vitprune", "Structured pruning of Hugging Face vision transformers.")
for command in (demo, inspect, prune, latency, evaluate, export, bench, report, convert, card):
    app.command()(command)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options that every command has."""


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
