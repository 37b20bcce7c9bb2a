"""Tables of what a model is made of and what pruning changed: for terminals and model cards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .layers import layer_rows

if TYPE_CHECKING:
    from rich.table import Table


# ---------------------------------------------------------------------- numbers as text
def human(number: float) -> str:
    """``86567656`` -> ``86.6M``."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            digits = number / limit
            return f"{digits:.{max(0, 2 - (digits >= 10) - (digits >= 100))}f}{letter}"
    return f"{number:g}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


# ---------------------------------------------------------------------- layers
def layer_table(model: Any, image_size: int | tuple[int, int] | None = None, title: str | None = None) -> Table:
    """:func:`layer_rows` for a terminal, with a line of totals."""
    return _rich(layer_cells(layer_rows(model, image_size)), title)


def layer_markdown(model: Any, image_size: int | tuple[int, int] | None = None) -> str:
    """:func:`layer_rows` for a card, with a line of totals."""
    return markdown_table(layer_cells(layer_rows(model, image_size)))


def layer_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    names = ["layer", "stage", "mixer", "heads", "qk", "v", "mlp"]
    names += [
        name for name in ("conv_channels", "attention_in", "mlp_in") if any(row.get(name) is not None for row in rows)
    ]
    names = [name for name in names if any(name in row for row in rows)]
    cells = [[*names, "params", "MACs", "share"]]
    for row in rows:
        sizes = [_size(row, name) for name in names]
        cells.append([*sizes, human(row["params"]), human(row["macs"]), _percent(row["share"])])
    totals = [human(sum(row[name] for row in rows)) for name in ("params", "macs")]
    return [*cells, ["total", *[""] * (len(names) - 1), *totals, _percent(sum(row["share"] for row in rows))]]


def _size(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    if name in ("layer", "stage"):
        return str(row[name])
    if name == "conv_channels":
        return str(row[name] or "-")
    return {None: "all", 0: "-", "none": "-"}.get(row[name], str(row[name]))


# ---------------------------------------------------------------------- before and after
#: column -> (heading, how a value is written); any other key of a row is a metric: a share if its name says so, else a
#: number of four digits
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "accuracy": ("accuracy", _percent),
    "params": ("params", human),
    "macs": ("MACs", human),
    "latency_ms": ("latency (ms)", lambda value: f"{value:.2f}"),
    "speedup": ("speed-up", lambda value: f"{value:.2f}x"),
}


def comparison_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """Models side by side, for a terminal.

    Args:
        rows: one mapping a model: ``name``, and any of ``accuracy`` (a fraction), ``params``, ``macs``,
            ``latency_ms``, ``speedup`` and other metrics. Columns that no row has are left out.
        title: printed above.
    """
    return _rich(comparison_cells(rows), title)


def comparison_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """:func:`comparison_table` for a card."""
    return markdown_table(comparison_cells(rows))


def comparison_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    present = {name: None for row in rows for name, value in row.items() if name != "name" and value is not None}
    metrics = [name for name in present if name not in _COLUMNS]
    names = [name for name in ("accuracy",) if name in present] + metrics
    names += [name for name in _COLUMNS if name in present and name != "accuracy"]
    cells = [["", *(_COLUMNS[name][0] if name in _COLUMNS else name for name in names)]]
    for row in rows:
        values = [(row.get(name), _writer(name)) for name in names]
        cells.append([str(row["name"]), *("" if value is None else write(value) for value, write in values)])
    return cells


def _writer(name: str) -> Callable[[Any], str]:
    if name in _COLUMNS:
        return _COLUMNS[name][1]
    is_share = "accuracy" in name or name.endswith(" kept") or name.startswith(("same ", "shared "))
    return _percent if is_share else "{:.4g}".format


# ---------------------------------------------------------------------- cells as tables
def _rich(cells: list[list[str]], title: str | None) -> Table:
    from rich.table import Table  # cards need none of it, and come with the package
    from rich.text import Text

    table = Table(title=None if title is None else Text(title))
    for i, heading in enumerate(cells[0]):
        table.add_column(Text(heading), justify="left" if i == 0 or heading == "mixer" else "right")
    for row in cells[1:]:
        if row[0] == "total":
            table.add_section()
        table.add_row(*(Text(cell) for cell in row))
    return table


def markdown_table(cells: list[list[str]]) -> str:
    """Rows of cells, the first one of headings, as a table of markdown; numbers to the right."""

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    rule = ["---" if i == 0 or heading == "mixer" else "---:" for i, heading in enumerate(cells[0])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
