"""``python -m benchmarks.vtab``: what is here, runs, reports and figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from hf_vitprune_cli.app import make_app

from .settings import MODEL, PREPROCESSINGS, RETRAININGS
from .tasks import DIGITS, VTAB

console = Console()
#: wider than any table
WIDE = console.options.update(max_width=10_000)
DATA = Path("data/vtab-1k")
OUTPUT = Path("runs/vtab")

app = make_app("benchmarks.vtab", "VTAB-1k: adapt, prune, retrain and compare.")

Data = Annotated[Path, typer.Option("--data", help="Folder with a folder a task.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")]


@app.command("list")
def list_tasks(data: Data = DATA) -> None:
    """The tasks, and which of them are here."""
    from .data import availability

    table = Table(title="VTAB-1k, and digits beside it")
    for heading in ("task", "group", "classes", "test images", "here", "from"):
        table.add_column(
            heading, justify="right" if heading in ("classes", "test images") else "left", no_wrap=heading == "task"
        )
    missing = []
    for task in (*VTAB, DIGITS):
        source, remark = availability(task, data)
        missing += [] if source else [task]
        here = f"[green]{source}[/]" if source else "no"
        shown = remark if source else ""
        table.add_row(task.name, task.group, str(task.classes), str(task.test_images), here, shown)
    # a pipe or a file has no width: a row stays on one line there, so that it can be searched for
    paper = console if sys.stdout.isatty() else Console(width=Measurement.get(console, WIDE, table).maximum)
    paper.print(table)
    if missing:
        console.print(f"{len(missing)} tasks are not here. For {missing[0].name}, as an example:")
        console.print(availability(missing[0], data)[1], soft_wrap=True)


@app.command()
def run(
    tasks: Annotated[str, typer.Option(help="Names or groups, with commas; 'all' for the nineteen.")] = "all",
    peft: Annotated[str, typer.Option(help="Ways to adapt, with commas: lora, dora, ..., linear, full.")] = "lora",
    pruning: Annotated[
        str, typer.Option(help="Ways to prune, with + between them: none+sls+truncate:k=6+depgraph+vtp.")
    ] = "none+sls",
    seeds: Annotated[str, typer.Option(help="With commas.")] = "42",
    model: Annotated[str, typer.Option(help="Pretrained model: Hub id or folder.")] = MODEL,
    data: Data = DATA,
    output: Output = OUTPUT,
    source: Annotated[str, typer.Option(help="Where tasks are read from: auto, folder, local, hub.")] = "auto",
    preprocessing: Annotated[str, typer.Option(help=f"{' or '.join(PREPROCESSINGS)}.")] = PREPROCESSINGS[0],
    image_size: Annotated[int | None, typer.Option(help="Side in pixels; the model's own by default.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 100,
    warmup_epochs: Annotated[int, typer.Option(help="Of them, with a rising learning rate.")] = 10,
    learning_rate: Annotated[float, typer.Option(help="Peak, of AdamW.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Images an update, over all processes.")] = 64,
    rank: Annotated[int, typer.Option(help="Of adapters that have one.")] = 8,
    alpha: Annotated[float, typer.Option(help="Threshold of SLS, in (0, 1).")] = 0.3,
    published: Annotated[
        bool, typer.Option("--published", help="Settings of the published runs, task by task; see README.")
    ] = False,
    retraining: Annotated[str, typer.Option(help=f"Of pruned models: {', '.join(RETRAININGS)}.")] = RETRAININGS[0],
    retraining_epochs: Annotated[int | None, typer.Option(help="As --epochs by default; 0 for none.")] = None,
    selection: Annotated[bool, typer.Option(help="Also report the best epoch on val200.")] = True,
    test_limit: Annotated[int | None, typer.Option(help="Test on so many images, drawn once.")] = None,
    any_size: Annotated[bool, typer.Option("--any-size", help="Accept other splits than VTAB-1k's.")] = False,
    speed_batch: Annotated[int, typer.Option(help="Images a forward pass of the throughput measurement.")] = 32,
    speed_rounds: Annotated[int, typer.Option(help="Rounds of it.")] = 15,
    workers: Annotated[int, typer.Option(help="Processes that load images.")] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave an accelerator alone.")] = False,
) -> None:
    """Adapt, prune and retrain: tasks x adaptations x prunings x seeds. Started again, it goes on where it was.

    Every run is one JSON file under OUTPUT/runs; those that are there are not repeated. With several processes, start
    it with accelerate launch or torchrun.
    """
    from hf_vitprune.errors import InvalidConfigError

    from .settings import Machine, Recipe, Settings
    from .sweep import run_sweep, runs_of

    recipe = Recipe(epochs, warmup_epochs, learning_rate, weight_decay, batch_size)
    settings = Settings(
        model=model,
        preprocessing=preprocessing,
        image_size=image_size,
        recipe=recipe.published() if published else recipe,
        published=published,
        retraining=retraining,
        retraining_epochs=retraining_epochs,
        rank=rank,
        alpha=alpha,
        selection=selection,
        test_limit=test_limit,
        source=source,
        any_size=any_size,
        speed_batch=speed_batch,
        speed_rounds=speed_rounds,
    )
    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InvalidConfigError(f"seeds are whole numbers with commas, not {seeds!r}") from None
    runs = runs_of(tasks.split(","), peft.split(","), pruning.split("+"), numbers)
    _leave_if(run_sweep(settings, runs, data, output, Machine(workers, cpu), console))


def _leave_if(failed: Sequence[object]) -> None:
    if failed:
        print(f"benchmarks.vtab: {len(failed)} runs could not be done (see above)", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def report(output: Output = OUTPUT) -> None:
    """Tables and the figure of all finished runs: OUTPUT/report.md and OUTPUT/tradeoff.png."""
    _report(output)


def _report(output: Path) -> None:
    from .local import note_on_model
    from .plots import plot_tradeoff
    from .report import report_markdown, rows_of
    from .store import Store

    records = list(Store(output).records())
    text = report_markdown(records, note_on_model(output))
    (output / "report.md").write_text(text, encoding="utf-8")
    plot_tradeoff(rows_of(records), output / "tradeoff.png")
    console.print(text, soft_wrap=True, markup=False, highlight=False)


@app.command()
def speed(
    data: Data = DATA,
    output: Output = OUTPUT,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave an accelerator alone.")] = False,
) -> None:
    """Measure the speed of all finished runs again, on a quiet machine for instance, and report."""
    from .settings import Machine
    from .sweep import measure_again

    measure_again(output, data, Machine(cpu=cpu), console)
    _report(output)


@app.command()
def layers(
    task: Annotated[str, typer.Argument(help="Task of an adapted model in OUTPUT.")],
    peft: Annotated[str, typer.Option(help="How it was adapted.")] = "lora",
    seed: Annotated[int, typer.Option(help="Of that run.")] = 42,
    data: Data = DATA,
    output: Output = OUTPUT,
    probe_images: Annotated[int, typer.Option(help="Test images for the linear probes, drawn once.")] = 2000,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave an accelerator alone.")] = False,
) -> None:
    """Probe accuracy and SLS's score against depth, and the t-SNE map of every layer: OUTPUT/layers.

    The model is the one that a sweep into OUTPUT has adapted; where there is none, it is adapted with OUTPUT's
    settings (the defaults, in a new folder).
    """
    from .layers import draw_layers
    from .settings import Machine

    draw_layers(task, peft, seed, data, output, Machine(cpu=cpu), probe_images, console)


@app.command()
def local(
    tasks: Annotated[str, typer.Option(help="With commas; all of them need no download.")] = "",
    output: Output = Path("runs/vtab-local"),
    epochs: Annotated[int | None, typer.Option(help="Of adaptation and retraining; for a shorter run.")] = None,
    source_images: Annotated[int | None, typer.Option(help="For pretraining; for a shorter run.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave an accelerator alone.")] = False,
) -> None:
    """Everything on this machine, without a download: pretrain, LoRA, SLS and its rivals, retraining, report, figure.

    About 25 minutes on one core. Started again, it goes on where it was.
    """
    from .layers import draw_layers
    from .local import TASKS, Local, run_local, shortened
    from .settings import Machine

    sizes = shortened(Local(), epochs, source_images)
    names = tasks.split(",") if tasks else list(TASKS)
    failed = run_local(sizes, names, output, Machine(cpu=cpu), console)
    for name in names:
        draw_layers(name, "lora", sizes.seeds[0], DATA, output, Machine(cpu=cpu), sizes.test_limit, console)
    _report(output)
    _leave_if(failed)
