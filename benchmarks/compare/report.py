"""The table: accuracy of every method at every budget, mean and deviation over the seeds."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

from hf_vitprune.errors import InvalidDataError

from .methods import METHODS
from .runs import DENSE

NOTHING = "–"


def table_of(records: Iterable[dict[str, Any]], measure: str = "accuracy") -> list[list[str]]:
    """Headings, and a row a family, steps and method; a column a task and budget.

    Args:
        measure: ``accuracy`` (of the test images) or ``validation``.
    """
    cells: dict[tuple[str, int, str], dict[tuple[str, float], list[float]]] = {}
    dense: dict[tuple[str, str], list[float]] = {}
    for record in records:
        if record["method"] == DENSE:
            dense.setdefault((record["family"], record["task"]), []).append(record[measure])
        else:
            row = cells.setdefault((record["family"], record["steps"], record["method"]), {})
            row.setdefault((record["task"], record["budget"]), []).append(record[measure])
    if not cells:
        raise InvalidDataError("there are no finished runs to report on")
    columns = sorted({column for row in cells.values() for column in row}, key=lambda c: (c[0], -c[1]))
    order = list(METHODS)
    headings = ["model, steps", "method", *(f"{task}, {budget:.0%}" for task, budget in columns)]
    rows = []
    for family, steps in dict.fromkeys(key[:2] for key in sorted(cells)):
        name = f"{family}, {steps}"
        rows.append([name, DENSE, *(_cell(dense.get((family, task), [])) for task, _ in columns)])
        methods = [key[2] for key in cells if key[:2] == (family, steps)]
        for method in sorted(methods, key=lambda m: order.index(m) if m in order else len(order)):
            row = cells[family, steps, method]
            rows.append([name, method, *(_cell(row.get(column, [])) for column in columns)])
    return [headings, *rows]


def costs_of(records: Iterable[dict[str, Any]], measure: str = "accuracy") -> list[list[str]]:
    """Headings, and a row a model, task, budget, number of steps and method: what it reaches, keeps and took."""
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("family", "task", "budget", "steps", "method"))
        rows.setdefault(key, []).append(record)
    if not rows:
        raise InvalidDataError("there are no finished runs to report on")
    table = [["model", "task", "MACs", "steps", "method", "seeds", "accuracy", "parameters", "search, s"]]
    for (family, task, budget, steps, method), same in sorted(rows.items()):
        seconds = [record["search_seconds"] for record in same if record["search_seconds"] is not None]
        accuracy, parameters = (_cell([record[name] for record in same]) for name in (measure, "params_ratio"))
        took = f"{fmean(seconds):.1f}" if seconds else NOTHING
        table.append([family, task, f"{budget:.0%}", str(steps), method, str(len(same)), accuracy, parameters, took])
    return table


def layers_table(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Headings, and a row a model: score / accuracy in percent of every layer, and the rank correlation of the two."""
    rows = []
    for record in records:
        pairs = zip(record["scores"].values(), record["probe_accuracy"].values(), strict=True)
        correlation = NOTHING if record["correlation"] is None else f"{record['correlation']:.2f}"
        layers = [f"{score:.2f} / {100 * accuracy:.1f}" for score, accuracy in pairs]
        rows.append([record["family"], record["task"], str(record["seed"]), *layers, correlation])
    most = max(len(row) for row in rows) - 4
    numbers = [f"layer {number}" for number in range(1, most + 1)]
    return [["model", "task", "seed", *numbers, "rank correlation"], *rows]


def scratch_table(records: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Headings, and a row a task, number of steps and shape of models that were trained from scratch."""
    rows: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for record in records:
        rows.setdefault((record["task"], record["steps"], record["shape"]), []).append(record)
    table = [["task", "steps", "shape", "weights", "MACs", "accuracy"]]
    for (task, steps, shape), same in rows.items():
        sizes = [f"{same[0]['weight_params'] / 1e6:.2f}M", f"{same[0]['macs'] / 1e6:.1f}M"]
        table.append([task, str(steps), shape, *sizes, _cell([record["accuracy"] for record in same])])
    return table


def _cell(values: list[float]) -> str:
    if not values:
        return NOTHING
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{spread}"
