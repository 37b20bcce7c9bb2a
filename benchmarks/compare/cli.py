"""Pruning methods against each other: one dense model, one cost, one number of optimizer steps.

    python -m benchmarks.compare run                      # ViT on digits and dSprites, all methods, three seeds
    python -m benchmarks.compare run --methods nvit --tasks digits --budgets 0.3 --seeds 0
    python -m benchmarks.compare report                   # --costs: parameters, and seconds of searches
    python -m benchmarks.compare draw                     # what mixes the tokens of every layer
    python -m benchmarks.compare scratch                  # DeiT against ReViT without pruning, as in NViT's paper
    python -m benchmarks.compare layers                   # SLS's score and a probe's accuracy, layer by layer

A dense model is trained for every family, task and seed (``models.py``), and kept. Every method gets a copy, a
fraction of its MACs, and so many optimizer steps for pruning and fine-tuning together (``methods/``). A run is a JSON
file; those that are there are not repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hf_vitprune.publish.report import markdown_table
from hf_vitprune_cli.app import make_app

OUTPUT = Path("runs/compare")

console = Console()

app = make_app("benchmarks.compare", __doc__)

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of models and results.")]


@app.command()
def run(
    families: Annotated[str, typer.Option(help="Models, with commas: vit, swin.")] = "vit",
    tasks: Annotated[
        str, typer.Option(help="With commas: digits, dsprites_loc, dsprites_ori.")
    ] = "digits,dsprites_loc",
    methods: Annotated[str, typer.Option(help="With commas; all by default.")] = "",
    budgets: Annotated[str, typer.Option(help="Fractions of the MACs that may remain.")] = "0.5,0.3",
    steps: Annotated[int, typer.Option(help="Optimizer steps of pruning and fine-tuning together.")] = 150,
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0,1,2",
    output: Output = OUTPUT,
) -> None:
    """Do the runs that are not done yet."""
    from ..common import write_record
    from .methods import METHODS
    from .runs import do_run, path_of, runs_of

    chosen = methods.split(",") if methods else list(METHODS)
    fractions, numbers = [float(b) for b in budgets.split(",")], [int(s) for s in seeds.split(",")]
    everything = runs_of(families.split(","), tasks.split(","), chosen, fractions, steps, numbers)
    waiting = [one for one in everything if not path_of(one, output).is_file()]
    console.print(f"{len(everything) - len(waiting)} of {len(everything)} runs are done already")
    for number, one in enumerate(waiting, start=1):
        record = do_run(one, output)
        write_record(record, path_of(one, output))
        console.print(
            f"{number}/{len(waiting)}  {one.name}: {record['accuracy']:.1%}, {record['macs_ratio']:.3f} of the MACs, "
            f"{record['seconds']:.0f} s",
            soft_wrap=True,
        )


@app.command()
def report(
    output: Output = OUTPUT,
    validation: Annotated[bool, typer.Option(help="Accuracy on the images that settings are chosen by.")] = False,
    markdown: Annotated[bool, typer.Option(help="For a README.")] = False,
    costs: Annotated[bool, typer.Option("--costs", help="Parameters and searches of every method, too.")] = False,
) -> None:
    """Accuracy in percent, mean and deviation over the seeds."""
    from .report import costs_of, table_of
    from .runs import records

    measure = "validation" if validation else "accuracy"
    cells = costs_of(records(output), measure) if costs else table_of(records(output), measure)
    if markdown:
        print(markdown_table(cells))
        return
    console.print(table_of(cells))


@app.command()
def draw(
    output: Output = OUTPUT,
    methods: Annotated[str, typer.Option(help="Of these methods, with commas.")] = "spvit",
) -> None:
    """Draw the architecture of every run: OUTPUT/figures, one picture each."""
    from hf_vitprune import Architecture
    from hf_vitprune.publish.block_report import plot_architecture

    from .runs import name_of, records

    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for record in records(output):
        if record["method"] in methods.split(","):
            architecture = Architecture.from_dict(record["architecture"])
            path = plot_architecture(architecture, folder / f"{name_of(record)}.png")
            console.print(f"{path}: {' '.join(shape.mixer for shape in architecture.layers)}", soft_wrap=True)


@app.command()
def scratch(
    shapes: Annotated[str, typer.Option(help="With commas: deit-t, revit-t, deit-s, revit-s.")] = "deit-t,revit-t",
    tasks: Annotated[str, typer.Option(help="With commas: digits, dsprites_loc, dsprites_ori.")] = "dsprites_loc",
    layers: Annotated[int, typer.Option(help="The published models have 12.")] = 6,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 16,
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0,1,2",
    output: Output = OUTPUT,
) -> None:
    """Train DeiT's shape and ReViT's from scratch: sizes, cost and accuracy. Runs that are there are not repeated."""
    from .report import scratch_table
    from .scratch import Training

    trainings = [
        Training(shape, task, layers, steps, batch_size, int(seed))
        for task in tasks.split(",")
        for seed in seeds.split(",")
        for shape in shapes.split(",")
    ]
    print(markdown_table(scratch_table([training.run(output) for training in trainings])))


@app.command()
def layers(
    families: Annotated[str, typer.Option(help="Models, with commas: vit, swin.")] = "vit",
    tasks: Annotated[str, typer.Option(help="With commas: digits, dsprites_loc, dsprites_ori.")] = "dsprites_loc",
    images: Annotated[int, typer.Option(help="That scores are made of, and that probes are tested on.")] = 1000,
    seeds: Annotated[str, typer.Option(help="With commas.")] = "0,1,2",
    output: Output = OUTPUT,
) -> None:
    """SLS's score and a linear probe's accuracy, layer by layer of the dense models, and their rank correlation."""
    from .layers import analysed
    from .report import layers_table

    rows = [
        analysed(family, task, int(seed), images, output)
        for family in families.split(",")
        for task in tasks.split(",")
        for seed in seeds.split(",")
    ]
    print(markdown_table(layers_table(rows)))
