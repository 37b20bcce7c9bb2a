"""``hf-vitprune latency``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InvalidConfigError

DTYPES = ("float32", "bfloat16", "float16")


def latency(
    model: Annotated[
        str, typer.Argument(help="Model folder or Hub id; or a table's file, which is shown and not measured again.")
    ],
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("latency_table.json"),
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.", min=1)] = 8,
    image_size: Annotated[int | None, typer.Option(help="Side of the images in pixels; the model's own.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ...")] = "cpu",
    grid: Annotated[str, typer.Option(help="coarse (minutes on two cores) or fine (an hour).")] = "coarse",
    rounds: Annotated[int, typer.Option(help="How often every shape is timed.", min=1)] = 5,
    monotone: Annotated[bool, typer.Option(help="Read times from a fit that never falls when a size grows.")] = True,
    show: Annotated[Path | None, typer.Option("--show", help="Plot the table into this file (png, svg, pdf).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Time the blocks of a model in many shapes on this machine: a table for --target-metric latency.

    A measurement that was cut off goes on where it was: its rounds are kept in OUT.partial.
    """
    import torch
    from rich.console import Console

    from ..latency.report import described, latency_tables, plot_latency
    from ..latency.table import LatencyTable

    if dtype not in DTYPES:
        raise InvalidConfigError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    console = Console()
    if Path(model).is_file():
        table = LatencyTable.load(model)
    else:
        from .app import empty_output, load_architecture

        empty_output(out, force)
        table = LatencyTable.measure(
            load_architecture(model),
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
        console.print(f"table written to {out}", highlight=False, soft_wrap=True)
    console.print(described(table), highlight=False, soft_wrap=True)
    for part in latency_tables(table):
        console.print(part)
    if show is not None:
        console.print(f"plot written to {plot_latency(table, show)}", highlight=False, soft_wrap=True)
