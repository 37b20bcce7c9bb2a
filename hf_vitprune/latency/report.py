"""A latency table for people: what each size of a block costs in time, as a table and as a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from ..spec.layer_shape import LayerShape
from ..spec.units import LAYER_UNITS
from ..utils.figures import new_figure, save_figure
from .table import LatencyTable

#: sizes of a block, in the order of tables and plots
SIZES = ("embedding", *LAYER_UNITS)


class Curve(NamedTuple):
    """Seconds of a block of a stage while one size goes over the grid, the others dense."""

    stage: int
    size: str
    values: tuple[int, ...]
    seconds: list[float]


def curves(table: LatencyTable) -> list[Curve]:
    """One curve for every stage and size that the table has more than one value of."""
    found = []
    for stage, grids in enumerate(table.stages):
        axes = {**grids["attention"].axes, **grids["mlp"].axes}
        for size in SIZES:
            if len(axes[size]) > 1:
                seconds = [_block(table, stage, {size: value}) for value in axes[size]]
                found.append(Curve(stage, size, tuple(axes[size]), seconds))
    return found


def _block(table: LatencyTable, stage: int, sizes: dict[str, int], shifted: bool = False) -> float:
    grids = table.stages[stage]
    dense = {size: grids["mlp" if size == "mlp" else "attention"].axes[size][-1] for size in SIZES} | sizes
    shape = LayerShape("attention", dense["heads"], dense["qk"], dense["v"], dense["mlp"], shifted=shifted)
    return table.layer_seconds(shape, dense["embedding"], stage)


def parts(table: LatencyTable) -> Iterator[tuple[str, float]]:
    """Name and seconds: a dense block of every stage, all of them together, what is around them, the dense model.

    Where there are windows, every second block of a stage shifts them.
    """
    depths, factors = table.covers["depths"], table.covers["width_factors"]
    inside = 0.0
    for stage, depth in enumerate(depths):
        seconds = _block(table, stage, {})
        inside += (depth - depth // 2) * seconds + depth // 2 * _block(table, stage, {}, shifted=True)
        yield f"a block of stage {stage}" if len(factors) > 1 else "a block", seconds
    outside = table.outer_seconds(table.covers["hidden_size"])
    yield f"{sum(depths)} blocks", inside
    yield "embedding, final norm, head", outside
    yield "dense model, predicted", inside + outside
    if "dense_seconds" in table.provenance:
        yield "dense model, measured", table.provenance["dense_seconds"]


def described(table: LatencyTable) -> str:
    """One line: of what, and measured where."""
    p = table.provenance
    threads = f" ({p['threads']} threads)" if "threads" in p else ""
    size = "x".join(map(str, p["image_size"]))
    return (
        f"{table.covers['model_type']} on {p['device']}{threads}, batch {p['batch_size']}, images of {size}, "
        f"{p['dtype']}, {p['date']}"
    )


def latency_tables(table: LatencyTable) -> list[Table]:
    """The parts of the dense model, and the curves: for a terminal."""
    dense = _table("dense model", "part", "ms")
    for name, seconds in parts(table):
        dense.add_row(Text(name), f"{1e3 * seconds:.2f}")
    sizes = _table("a block, while one size goes over the grid and the others stay dense", "size", "value: ms")
    for curve in curves(table):
        name = f"stage {curve.stage} {curve.size}" if len(table.stages) > 1 else curve.size
        pairs = [f"{value}: {1e3 * s:.2f}" for value, s in zip(curve.values, curve.seconds, strict=True)]
        sizes.add_row(Text(name), Text("  ".join(pairs)))
    return [dense, sizes]


def _table(title: str, first: str, second: str) -> Table:
    table = Table(title=Text(title))
    table.add_column(first, no_wrap=True)
    table.add_column(second, justify="right" if second == "ms" else "left")
    return table


def plot_latency(table: LatencyTable, path: str | Path) -> Path:
    """Draw the curves to a file (png, svg, pdf): one panel a size, one line a stage; gives its path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    drawn = curves(table)
    names = [size for size in SIZES if any(curve.size == size for curve in drawn)]
    figure = new_figure(2.8 * max(len(names), 1), 2.8)
    panels: Any = figure.subplots(1, max(len(names), 1), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=False):
        for curve in (curve for curve in drawn if curve.size == name):
            times = [1e3 * s for s in curve.seconds]
            panel.plot(curve.values, times, marker="o", markersize=3, linewidth=1, label=f"stage {curve.stage}")
        panel.set(xlabel=name, ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms a block")
    if len(table.stages) > 1:
        panels[0].legend(fontsize="small")
    figure.suptitle(described(table), fontsize=9)
    return save_figure(figure, path)
