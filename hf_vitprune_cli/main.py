"""The ``hf-vitprune`` command."""

from __future__ import annotations

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


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
