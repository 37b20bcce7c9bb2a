"""What models are made of and what pruning changed: rows of plain data, and tables for terminals and cards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..cost import cost_parts
from ..spec.architecture import Architecture
from ..spec.units import LAYER_UNITS

if TYPE_CHECKING:
    from rich.table import Table

#: sizes of a layer that few models have
_RARE = ("conv_channels", "attention_in", "mlp_in")


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
def layer_rows(model: Any, image_size: int | tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """One dict a layer, and one of what lies outside the layers.

    Keys: ``layer`` (index, or ``"other"``), ``stage`` (Swin), ``mixer``, ``heads``, ``qk``, ``v``, ``mlp``,
    ``conv_channels`` (None: no convolution), ``attention_in`` and ``mlp_in`` (None: all channels), ``params``,
    ``macs`` and ``share`` (of all multiply-adds).

    Args:
        model: a model or an Architecture.
        image_size: side, or (height, width), in pixels; the config's by default.

    Raises:
        UnsupportedModelError: no family is registered for the model.
    """
    architecture = Architecture.given(model)
    costs: dict[Any, list[int]] = {}
    for part in cost_parts(architecture, image_size):
        words = part.name.split()
        row = costs.setdefault(int(words[1]) if words[0] == "layer" else "other", [0, 0])
        row[0] += part.weights + part.others
        row[1] += part.macs
    total = sum(macs for _, macs in costs.values())
    return [
        {
            "layer": key,
            **({} if key == "other" else sizes_of(architecture, key)),
            "params": params,
            "macs": macs,
            "share": macs / total if total else 0.0,
        }
        for key, (params, macs) in costs.items()
    ]


def sizes_of(architecture: Architecture, layer: int) -> dict[str, Any]:
    """What a row of :func:`layer_rows` says of a layer beside its cost."""
    shape = architecture.layers[layer]
    stage = {} if architecture.depths is None else {"stage": architecture.stages[layer]}
    sizes = {unit: getattr(shape, field) for unit, field in LAYER_UNITS.items()}
    return {**stage, "mixer": shape.mixer, **sizes, **{name: getattr(shape, name) for name in _RARE}}


def size_at(architecture: Architecture, layer: int, name: str) -> int:
    """One of :func:`sizes_of`; of a branch that reads all channels, how many there are."""
    size: int | None = sizes_of(architecture, layer)[name]
    return architecture.width(layer) if size is None else size


def layer_table(model: Any, image_size: int | tuple[int, int] | None = None, title: str | None = None) -> Table:
    """:func:`layer_rows` for a terminal, with a line of totals."""
    return _rich(layer_cells(model, image_size), title)


def layer_markdown(model: Any, image_size: int | tuple[int, int] | None = None) -> str:
    """:func:`layer_rows` for a card, with a line of totals."""
    return markdown_table(layer_cells(model, image_size))


def layer_cells(model: Any, image_size: int | tuple[int, int] | None = None) -> list[list[str]]:
    """The same as text, headings first."""
    rows = layer_rows(model, image_size)
    everything = ["layer", "stage", "mixer", "heads", "qk", "v", "mlp", *_RARE]
    names = [name for name in everything if any(row.get(name) is not None for row in rows)]
    cells = [[*names, "params", "MACs", "share"]]
    for row in rows:
        sizes = [_size(row, name) for name in names]
        cells.append([*sizes, human(row["params"]), human(row["macs"]), _percent(row["share"])])
    totals = [human(sum(row[name] for row in rows)) for name in ("params", "macs")]
    return [*cells, ["total", *[""] * (len(names) - 1), *totals, _percent(sum(row["share"] for row in rows))]]


def _size(row: dict[str, Any], name: str) -> str:
    if name in ("layer", "stage") or name not in row:
        return str(row.get(name, ""))
    if row[name] is None and name != "conv_channels":
        return "all"
    return "-" if row[name] in (None, 0, "none") else str(row[name])


# ---------------------------------------------------------------------- before and after
#: column -> (heading, how a value is written); any other key of a row is a metric: a share if its name says so, else a
#: number of four digits
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "accuracy": ("accuracy", _percent),
    "params": ("params", human),
    "macs": ("MACs", human),
    "latency_ms": ("latency (ms)", "{:.2f}".format),
    "speedup": ("speed-up", "{:.2f}x".format),
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
    """The same as text, headings first."""
    present = {name: None for row in rows for name, value in row.items() if name != "name" and value is not None}
    first, *others = _COLUMNS
    order = [first, *(name for name in present if name not in _COLUMNS), *others]
    columns = {name: _COLUMNS.get(name, (name, _writer(name))) for name in order if name in present}
    cells = [["", *(heading for heading, _ in columns.values())]]
    for row in rows:
        values = [(row.get(name), write) for name, (_, write) in columns.items()]
        cells.append([str(row["name"]), *("" if value is None else write(value) for value, write in values)])
    return cells


def _writer(metric: str) -> Callable[[Any], str]:
    is_share = "accuracy" in metric or metric.endswith(" kept") or metric.startswith(("same ", "shared "))
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
