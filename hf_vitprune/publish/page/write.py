"""The page itself: everything that was found, put into the template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ...cost import Cost, count
from ...latency.measure import Timing
from ...spec.architecture import Architecture
from ..report import comparison_cells, human, layer_cells
from .answers import Answers, answers_section
from .charts import line_chart, time_chart
from .pictures import Pictures
from .shapes import Budget, size_charts


def write_page(
    path: str | Path,
    architectures: Mapping[str, Architecture],
    places: Mapping[str, Sequence[int]],
    *,
    image_size: int | tuple[int, int] | None = None,
    timings: Mapping[str, Timing] | None = None,
    budgets: Sequence[Budget] = (),
    scored_images: int = 0,
    answers: Answers | None = None,
    pictures: Pictures | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    guessed: Collection[str] = (),
) -> Path:
    """Write one HTML file: no network, no script, light and dark, for desks and phones.

    Args:
        path: file to write.
        architectures: name -> architecture; the first one is the dense model.
        places: pruned model -> the dense model's layer that each of its layers was.
        image_size: what multiply-adds are counted for; the config's by default.
        timings: as ``measure_speed`` gives, of all models.
        budgets: of the dense model's one-shot scores.
        scored_images: how many those had seen.
        answers: of all models, on ``pictures``.
        pictures: the images.
        metrics: model -> name -> number: more columns of the table.
        guessed: pruned models whose ``places`` are not known.

    Returns:
        The path.
    """
    names = list(architectures)
    rows = [
        _row(name, count(one, image_size), timings, answers, metrics or {}, other=name != names[0])
        for name, one in architectures.items()
    ]
    shapes = [_shape(architectures, name, name in guessed) for name in names]
    context = {
        "title": f"Pruning report: {names[0]}",
        "about": f"A {architectures[names[0]].model_type}, and what pruning made of it: {', '.join(names[1:])}.",
        "names": names,
        "models": [
            {"name": row["name"], "facts": _facts(row, rows[0], answers), "shape": shape}
            for row, shape in zip(rows[1:], shapes[1:], strict=True)
        ],
        "comparison": comparison_cells(rows),
        "sizes": size_charts(architectures, places, image_size),
        "layers": [(name, layer_cells(one, image_size)) for name, one in architectures.items()],
        "budgets": _budgets(rows, budgets, scored_images) if budgets else None,
        "latency": _latency(names, timings) if timings else None,
        "answers": None if answers is None or pictures is None else answers_section(answers, pictures),
        "source": "" if pictures is None else pictures.source,
        "footer": "Made by hf-vitprune report. Multiply-adds are of one image.",
    }
    environment = Environment(
        loader=PackageLoader("hf_vitprune.publish"),
        autoescape=True,  # names of classes, files and models are other people's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template("page.html").render(context), encoding="utf-8")
    return path


def _row(
    name: str,
    cost: Cost,
    timings: Mapping[str, Timing] | None,
    answers: Answers | None,
    metrics: Mapping[str, Mapping[str, float]],
    other: bool,
) -> dict[str, Any]:
    """Of the table of all models; ``other``: it is not the dense one."""
    row: dict[str, Any] = {"name": name, **metrics.get(name, {})}
    if answers is not None and answers.accuracy:
        row[answers.accuracy_name] = answers.accuracy[name]
    if answers is not None and other:
        row["same predictions" if answers.kind == "classes" else "same neighbours"] = answers.agreement(name)
        row["output error"] = answers.errors.get(name)
    row |= {"params": cost.params, "macs": cost.macs}
    if timings is not None:
        row |= {"latency_ms": 1e3 * timings[name].seconds, "speedup": timings[name].speedup}
    return row


def _facts(row: Mapping[str, Any], dense: Mapping[str, Any], answers: Answers | None) -> list[tuple[str, str, str]]:
    """(what, value, more) of a card of the summary."""
    facts = [
        (what, f"{row[key] / dense[key]:.1%}", human(row[key]))
        for key, what in (("macs", "multiply-adds kept"), ("params", "parameters kept"))
    ]
    if "speedup" in row:
        facts.append(("speed-up", f"{row['speedup']:.2f}x", f"{row['latency_ms']:.1f} ms a batch"))
    if answers is not None and answers.accuracy:
        own, whole = row[answers.accuracy_name], dense[answers.accuracy_name]
        facts.append((answers.accuracy_name, f"{own:.1%}", f"{100 * (own - whole):+.1f} points to dense"))
    elif answers is not None:
        what = "same prediction" if answers.kind == "classes" else "same neighbours"
        facts.append((what, f"{answers.agreement(row['name']):.1%}", "as the dense model"))
    return facts


def _shape(architectures: Mapping[str, Architecture], name: str, guessed: bool) -> str:
    own, dense = architectures[name], next(iter(architectures.values()))
    shape = f"{len(own.layers)} of {len(dense.layers)} layers, width {own.hidden_size}"
    shape += f" of {dense.hidden_size}" if own.hidden_size != dense.hidden_size else ""
    return shape + ("; which ones stayed is not on record, and they are drawn from the bottom" if guessed else "")


def _budgets(rows: Sequence[Mapping[str, Any]], budgets: Sequence[Budget], images: int) -> dict[str, Any]:
    dense, *models = rows
    points = [(row["name"], row["macs"] / dense["macs"], row.get("output error")) for row in models]
    summary = f"Predicted error falls from {budgets[0].error:.2g} at {budgets[0].share:.0%} of the multiply-adds "
    summary += f"to {budgets[-1].error:.2g} at {budgets[-1].share:.0%}."
    measured = [(name, share, error) for name, share, error in points if error is not None]
    chart = line_chart("error of the output", "multiply-adds kept", budgets, measured, summary)
    cells = [["multiply-adds kept", "predicted error"]]
    cells += [[f"{budget.share:.1%}", f"{budget.error:.3g}"] for budget in budgets]
    return {"chart": chart, "cells": cells, "images": images, "points": measured}


def _latency(names: Sequence[str], timings: Mapping[str, Timing]) -> dict[str, Any]:
    first = timings[names[0]]
    s = first.setting
    threads = f", {s['threads']} thread{'s' if s['threads'] > 1 else ''}" if "threads" in s else ""
    rows = [
        (name, 1e3 * one.seconds, 1e3 * one.spread, f"{1e3 * one.seconds:.2f} ms, {one.speedup:.2f}x")
        for name, one in ((name, timings[name]) for name in names)
    ]
    setting = (
        f"Median of {len(first.samples)} rounds in which the models took turns; the thin line is as long as the "
        f"quartiles are apart. A batch of {s['batch_size']} random images of {' x '.join(map(str, s['image_size']))} "
        f"pixels in {s['dtype']} on {s['device']}{threads}; torch {s['torch']}, transformers {s['transformers']}."
    )
    return {"chart": time_chart("time of a batch", rows), "setting": setting}
