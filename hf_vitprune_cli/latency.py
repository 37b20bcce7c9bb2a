"""``hf-vitprune latency``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .app import ForceOption, ImageSizeOption, empty_output, need_plots, say


def latency(
    model: Annotated[
        str, typer.Argument(help="Model folder or Hub id; or a table's file, which is shown and not measured again.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("latency_table.json"),
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.", min=1)] = 8,
    image_size: ImageSizeOption = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="What is timed in.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    grid: Annotated[Literal["coarse", "fine"], typer.Option(help="Minutes on two cores, or an hour.")] = "coarse",
    rounds: Annotated[int, typer.Option(help="How often every shape is timed.", min=1)] = 5,
    monotone: Annotated[bool, typer.Option(help="Read times from a fit that never falls when a size grows.")] = True,
    show: Annotated[Path | None, typer.Option("--show", help="Plot the table into this file (png, svg, pdf).")] = None,
    force: ForceOption = False,
) -> None:
    """Time the blocks of a model in many shapes on this machine: a table for --target-metric.

    A measurement that was cut off goes on where it was: its rounds are kept in OUT.partial.
    """
    is_table = Path(model).is_file()
    if not is_table:
        empty_output(out, force, model, file=True)
    if show is not None:
        empty_output(show, force, model, file=True)
        need_plots()

    import torch
    from rich.console import Console

    from hf_vitprune.latency.report import described, latency_tables, plot_latency
    from hf_vitprune.latency.table import LatencyTable

    from .saved import load_tower

    if is_table:
        table = LatencyTable.load(model)
    else:
        table = LatencyTable.measure(
            load_tower(model)[0],
            batch_size=batch_size,
            image_size=image_size,
            dtype=getattr(torch, dtype),
            device=device,
            grid=grid,
            rounds=rounds,
            monotone=monotone,
            partial=out.with_name(out.name + ".partial"),
        )
        table.save(out)
        say(f"table written to {out}")
    say(described(table))
    for part in latency_tables(table):
        Console().print(part)
    if show is not None:
        say(f"plot written to {plot_latency(table, show)}")
