"""``hf-vitprune bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import ForceOption, ImageSizeOption, PartOption, empty_output, need_plots, say


def bench(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="What the others are compared with.")],
    pruned: Annotated[list[str], typer.Argument(metavar="PRUNED...", help="Folders of saved models, or Hub ids.")],
    forms: Annotated[
        str | None,
        typer.Option(help="eager,compile,onnx,openvino,onnx-int8,openvino-int8; all that are installed by default."),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Images a forward pass; may be given several times; 1 and 8.", min=1)
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of every runtime; torch's own number.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="How often every form of every model is timed.", min=1)] = 15,
    image_size: ImageSizeOption = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images: what the files keep of the models is told for them.")
    ] = None,
    part: PartOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Plot into this file (png, svg, pdf).")] = None,
    force: ForceOption = False,
) -> None:
    """Latency and memory of models in every form, side by side: each in a process of its own, timed in turns.

    Every exported file is compared with its model first. Nothing is kept but what is printed.
    """
    if plot is not None:
        empty_output(plot, force, dense, *pruned, file=True)
        need_plots()

    from rich.console import Console

    from hf_vitprune.publish.bench import bench as measure
    from hf_vitprune.publish.bench.run import bench_table, check_forms, installed_forms, plot_bench

    from .export import read_images
    from .saved import load_with_adapters, saved_metrics

    if forms is None:
        chosen, left_out = installed_forms()
        for reason in left_out:
            typer.echo(reason, err=True)
    else:
        chosen = [form.strip() for form in forms.split(",")]
        check_forms(chosen)
    seen = None if images is None else read_images(dense, images, None, image_size)
    models: dict[str, Any] = {}
    metrics: dict[str, dict[str, float]] = {}  # what evaluate left beside them
    for path in (dense, *pruned):
        name = path if Path(path).name in models else Path(path).name
        models[name] = load_with_adapters(path)
        if known := saved_metrics(path):
            metrics[name] = known
    rows, setting = measure(
        models,
        chosen,
        batch_sizes=batch_size or [1, 8],
        threads=threads,
        rounds=rounds,
        image_size=image_size,
        part=part,
        images=seen,
        progress=not as_json,
    )
    if as_json:
        found = {"setting": setting, "rows": [row._asdict() for row in rows], "metrics": metrics}
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(bench_table(rows, setting))
        for name, known in metrics.items():
            say(f"{name}: " + ", ".join(f"{metric} {value:.4g}" for metric, value in known.items()))
    if plot is not None:
        said = plot_bench(rows, setting, plot)
        if not as_json:
            say(f"plot written to {said}")
