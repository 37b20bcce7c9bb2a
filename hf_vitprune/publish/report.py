"""Tables and plots of what a model is made of and what pruning changed: for terminals, model cards and papers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..cost import cost_parts
from ..errors import MissingExtraError
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from ..spec.origin import dense_of

#: sizes of a layer that a plan can reduce, in the order of tables and plots
SIZES = ("heads", "qk", "v", "mlp", "attention_in", "mlp_in")
_OUTSIDE = "other"


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
    """One dict a layer, and one of what lies outside the layers, as plain data.

    Keys: ``layer`` (index, or ``"other"``), ``stage`` (Swin), ``mixer``, ``heads``, ``qk``, ``v``, ``mlp``,
    ``conv_channels`` (None: no convolution), ``attention_in`` and ``mlp_in`` (None: all channels), ``params``,
    ``macs`` and ``share`` (of all multiply-adds).

    Args:
        model: a model or an Architecture.
        image_size: side, or (height, width), in pixels; the config's by default.

    Raises:
        UnsupportedModelError: no family is registered for the model.
    """
    architecture = model if isinstance(model, Architecture) else Architecture.of(model)
    costs: dict[Any, list[int]] = {}
    for part in cost_parts(architecture, image_size):
        words = part.name.split()
        key = int(words[1]) if words[0] == "layer" else _OUTSIDE
        row = costs.setdefault(key, [0, 0])
        row[0] += part.weights + part.others
        row[1] += part.macs
    total = sum(macs for _, macs in costs.values())
    rows: list[dict[str, Any]] = []
    for key, (params, macs) in costs.items():
        sizes = _sizes(architecture, key) if key != _OUTSIDE else {}
        rows.append({"layer": key, **sizes, "params": params, "macs": macs, "share": macs / total if total else 0.0})
    return rows


def _sizes(architecture: Architecture, layer: int) -> dict[str, Any]:
    shape = architecture.layers[layer]
    stage = {} if architecture.depths is None else {"stage": architecture.stages[layer]}
    return {
        **stage,
        "mixer": shape.mixer,
        "heads": shape.heads,
        "qk": shape.qk_dim,
        "v": shape.v_dim,
        "mlp": shape.mlp,
        "conv_channels": shape.conv_channels,
        "attention_in": shape.attention_in,
        "mlp_in": shape.mlp_in,
    }


def layer_table(model: Any, image_size: int | tuple[int, int] | None = None, title: str | None = None) -> Table:
    """:func:`layer_rows` for a terminal, with a line of totals."""
    return _rich(_layer_cells(layer_rows(model, image_size)), title)


def layer_markdown(model: Any, image_size: int | tuple[int, int] | None = None) -> str:
    """:func:`layer_rows` for a card, with a line of totals."""
    return markdown_table(_layer_cells(layer_rows(model, image_size)))


def _layer_cells(rows: list[dict[str, Any]]) -> list[list[str]]:
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
#: column -> (heading, how a value is written); any other key of a row is a metric, written with four digits
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
    return _rich(_comparison_cells(rows), title)


def comparison_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """:func:`comparison_table` for a card."""
    return markdown_table(_comparison_cells(rows))


def _comparison_cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    present = {name: None for row in rows for name, value in row.items() if name != "name" and value is not None}
    metrics = [name for name in present if name not in _COLUMNS]
    names = [name for name in ("accuracy",) if name in present] + metrics
    names += [name for name in _COLUMNS if name in present and name != "accuracy"]
    plain: tuple[str, Callable[[Any], str]] = ("", lambda value: f"{value:.4g}")
    cells = [["", *(_COLUMNS[name][0] if name in _COLUMNS else name for name in names)]]
    for row in rows:
        values = [(row.get(name), _COLUMNS.get(name, plain)[1]) for name in names]
        cells.append([str(row["name"]), *("" if value is None else write(value) for value, write in values)])
    return cells


# ---------------------------------------------------------------------- cells as tables
def _rich(cells: list[list[str]], title: str | None) -> Table:
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


# ---------------------------------------------------------------------- plot
def kept_shares(subject: PruningPlan | Architecture | Any) -> dict[str, list[float]]:
    """Unit -> share of it that each layer keeps, bottom to top.

    A plan is compared with the model that it is for, and removed layers keep 0. An architecture or a model does not
    know which layers are gone: each of its own is compared with a dense one. ``attention_in`` and ``mlp_in`` are
    there only where a layer has them.
    """
    if isinstance(subject, PruningPlan):
        reference, positions = subject.source, [entry.index for entry in subject.layers]
        architecture = subject.architecture
    else:
        architecture = subject if isinstance(subject, Architecture) else Architecture.of(subject)
        reference = dense_of(architecture.config, architecture.task)
        places = _places(reference)
        positions = [places.index(place) for place in _places(architecture)]
    shares = {name: [0.0] * len(reference.layers) for name in SIZES}
    seen = {name: name in SIZES[:4] for name in SIZES}
    for i, position in enumerate(positions):
        kept, full = _sizes(architecture, i), _sizes(reference, position)
        for name in SIZES:
            width = full[name] if full[name] is not None else reference.width(position)
            size = kept[name] if kept[name] is not None else architecture.width(i)
            seen[name] |= kept[name] is not None
            shares[name][position] = size / width if width else 0.0
    if not isinstance(subject, PruningPlan):
        shares = {name: [row[position] for position in positions] for name, row in shares.items()}
    return {name: row for name, row in shares.items() if seen[name]}


def _places(architecture: Architecture) -> list[tuple[int, int]]:
    """(stage, position in the stage) of every layer."""
    stages = architecture.stages
    return [(stage, stages[:i].count(stage)) for i, stage in enumerate(stages)]


def plot_removed(subjects: Any, path: str | Path) -> Path:
    """Draw how much of every layer stays: one panel a unit, layers from left to right.

    Args:
        subjects: a plan, an architecture or a model, or several of them by name.
        path: file to write; its suffix says the format (png, svg, pdf).

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    named = subjects if isinstance(subjects, Mapping) else {"": subjects}
    shares = {name: kept_shares(subject) for name, subject in named.items()}
    units = [unit for unit in SIZES if any(unit in rows for rows in shares.values())]
    columns = min(len(units), 4)
    lines = -(-len(units) // columns)
    figure = new_figure(3.2 * columns, 2.6 * lines)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for i, panel in enumerate(axes.flat):
        if i >= len(units):
            panel.set_visible(False)
            continue
        for name, rows in shares.items():
            if units[i] in rows:
                panel.plot(rows[units[i]], marker="o", markersize=3, linewidth=1, label=name)
        panel.set(title=units[i], xlabel="layer", ylim=(-0.03, 1.05))
        panel.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("share kept")
    if any(named):
        axes[0][0].legend(fontsize="small")
    return save_figure(figure, path)


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure that belongs to no window.

    Args:
        width: in inches.
        height: in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'hf_vitprune[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure; the suffix of the path says the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
