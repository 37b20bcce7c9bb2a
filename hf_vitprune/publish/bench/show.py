"""What a bench measured, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ...utils.figures import PALETTE, new_figure, save_figure
from .run import Measured


def bench_table(rows: Sequence[Measured], setting: dict[str, Any]) -> Table:
    """Every form of every model, batch size by batch size.

    "vs MACs" is the speed-up over the first model in the same form, as a share of what its MACs promise.
    """
    height, width = setting["image_size"]
    title = f"{setting['device']}, {setting['threads']} threads, {height} x {width}, {setting['rounds']} rounds"
    table = Table(title=title)
    for head in ("batch", "form", "model", "ms", "speed-up", "vs MACs", "vs dense float32", "peak MB", "file MB"):
        table.add_column(head, justify="left" if head in ("form", "model") else "right")
    kept = any(row.kept for row in rows)
    if kept:
        table.add_column("cosine", justify="right")
        table.add_column("top-1 kept", justify="right")
    before = None
    for row in sorted(rows, key=lambda one: (one.batch_size, one.form)):
        if before not in (None, (row.batch_size, row.form)):
            table.add_section()
        before = row.batch_size, row.form
        cells = [
            str(row.batch_size),
            row.form,
            row.name,
            f"{row.seconds * 1e3:.1f}",
            f"{row.speedup:.2f}",
            f"{row.speedup / row.macs_ratio:.2f}",
            "" if row.against_dense is None else f"{row.against_dense:.2f}",
            f"{row.megabytes:.0f}",
            f"{row.file_megabytes:.1f}",
        ]
        if kept:
            cosine, top1 = ((row.kept or {}).get(key) for key in ("cosine", "top1"))
            cells += ["" if cosine is None else f"{cosine:.4f}", "" if top1 is None else f"{top1:.1%}"]
        table.add_row(*cells)
    return table


def plot_bench(rows: Sequence[Measured], setting: dict[str, Any], path: str | Path) -> Path:
    """Bars of milliseconds an image, one panel a batch size, and of peak memory, into a file (png, svg, pdf).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    batches = sorted({row.batch_size for row in rows})
    names, forms = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("name", "form"))
    figure = new_figure(5 * (len(batches) + 1), 4)
    axes = figure.subplots(1, len(batches) + 1)
    thick = 0.8 / len(names)
    panels = [(batch, "milliseconds an image") for batch in batches] + [(batches[-1], "peak memory, MB")]
    for axis, (batch, what) in zip(axes, panels, strict=True):
        for number, name in enumerate(names):
            of = {row.form: row for row in rows if row.name == name and row.batch_size == batch}
            values = [of[form].megabytes if "memory" in what else of[form].seconds * 1e3 / batch for form in forms]
            axis.bar(
                [i + number * thick for i in range(len(forms))],
                values,
                thick,
                label=name,
                color=PALETTE[number % len(PALETTE)],
            )
        axis.set_xticks([i + 0.4 - thick / 2 for i in range(len(forms))], forms, rotation=30, ha="right")
        axis.set_ylabel(what)
        axis.set_title(f"batch {batch}")
        axis.legend()
    figure.suptitle(f"{setting['device']}, {setting['threads']} threads")
    return save_figure(figure, path)
