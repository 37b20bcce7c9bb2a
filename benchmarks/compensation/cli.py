"""Accuracy without training: compensation and one-shot pruning on small trained models, next to Torch-Pruning.

    python -m benchmarks.compensation run                  # all methods, three models and draws: see also --methods
    python -m benchmarks.compensation run --images 8 --methods one-shot    # accuracy against the number of images
    python -m benchmarks.compensation report
    python -m benchmarks.compensation cost                 # seconds and memory at the shape of ViT-B/16

The models are those of ``benchmarks.compare``, trained where they are not there yet. A run is a JSON file; those that
are there are not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_vitprune.publish.report import markdown_table
from hf_vitprune_cli.app import make_app

from ..common import table_of

OUTPUT = Path("runs/compensation")
console = Console(width=200)

app = make_app("benchmarks.compensation", __doc__)
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of results.")]


@app.command()
def run(
    subjects: Annotated[str, typer.Option(help="With semicolons; all by default.")] = "",
    methods: Annotated[str, typer.Option(help="With semicolons; all by default.")] = "",
    seeds: Annotated[int, typer.Option(help="Models of every kind.")] = 3,
    draws: Annotated[int, typer.Option(help="Draws of calibration images.")] = 3,
    images: Annotated[int, typer.Option(help="Calibration images.")] = 128,
    models: Annotated[Path, typer.Option(help="Folder of benchmarks.compare with the trained models.")] = Path(
        "runs/compare"
    ),
    output: Output = OUTPUT,
) -> None:
    """Do the runs that are not done yet."""
    from ..trained import SUBJECTS
    from .methods import METHODS
    from .runs import do_all, runs_of

    chosen = methods.split(";") if methods else list(METHODS)
    for name in chosen:
        if name not in METHODS:
            raise typer.BadParameter(f"methods are {'; '.join(METHODS)}, not {name!r}")
    everything = runs_of(subjects.split(";") if subjects else list(SUBJECTS), chosen, seeds, draws, images)
    for number, (one, record) in enumerate(do_all(everything, output, models), start=1):
        if record is not None:
            found = ", ".join(f"{row['accuracy']:.1f} ({row['error']:.3f})" for row in record["rows"])
            console.print(
                f"{number}/{len(everything)} {one.subject}, seed {one.seed}, draw {one.draw}, {one.method}: "
                f"{record['dense']:.1f} -> {found}",
                highlight=False,
            )


@app.command()
def report(output: Output = OUTPUT, markdown: Annotated[bool, typer.Option(help="For a README.")] = False) -> None:
    """Accuracy in percent / relative error of the logits."""
    from .report import by_images, tables, verdicts
    from .runs import records

    found = records(output)
    for title, cells in {**tables(found), "25 % of MACs against images": by_images(found)}.items():
        if markdown:
            print(f"\n{title}\n\n{markdown_table(cells)}")
        else:
            console.print(table_of(cells, title))
    for line in verdicts(found):
        console.print(line, highlight=False)


@app.command()
def cost(
    images: Annotated[int, typer.Option(help="Calibration images.")] = 128,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    shapes: Annotated[str, typer.Option(help="width x layers, with commas.")] = "768x12",
    statistics: Annotated[bool, typer.Option(help="Keep what --save-scores keeps.")] = False,
) -> None:
    """Processor seconds and peak memory of scoring, choosing and compensating, each shape in its own process."""
    from .cost import measured

    times = "score, s", "choose, s", "compensate, s", "all, s", "score and compensate / dense pass"
    cells = [["shape", "params", *times, "loaded", "peak of scoring / loaded", "of all", "added / model"]]
    for shape in shapes.split(","):
        width, layers = map(int, shape.split("x"))
        cells.append([shape, *measured(width, layers, images, threads, statistics)])
    console.print(table_of(cells))
