"""The page itself: everything that was found, put into the template."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ...cost import count
from ...latency.measure import Timing
from ...spec.architecture import Architecture
from ..layers import layer_rows
from ..report import comparison_cells, human, layer_cells
from .answers import Answers
from .budgets import Budget
from .charts import line_chart, time_chart
from .pictures import Pictures
from .shapes import size_charts
from .shown import answers_section

TEMPLATE = "page.html"


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
    costs = {name: count(one, image_size) for name, one in architectures.items()}
    context = {
        "title": f"Pruning report: {names[0]}",
        "about": f"A {architectures[names[0]].model_type}, and what pruning made of it: {', '.join(names[1:])}.",
        "names": names,
        "models": [_model(name, architectures, costs, timings, answers, name in guessed) for name in names[1:]],
        "comparison": comparison_cells(_rows(names, costs, timings, answers, metrics or {})),
        "sizes": size_charts(architectures, places, image_size),
        "layers": [(name, layer_cells(layer_rows(one, image_size))) for name, one in architectures.items()],
        "budgets": _budgets(names, budgets, scored_images, costs, answers) if budgets else None,
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
    path.write_text(environment.get_template(TEMPLATE).render(context), encoding="utf-8")
    return path


def _model(
    name: str,
    architectures: Mapping[str, Architecture],
    costs: Mapping[str, Any],
    timings: Mapping[str, Timing] | None,
    answers: Answers | None,
    guessed: bool,
) -> dict[str, Any]:
    """A card of the summary."""
    dense, *_ = architectures
    small, whole = costs[name], costs[dense]
    facts = [
        {"what": "multiply-adds kept", "value": f"{small.macs / whole.macs:.1%}", "more": human(small.macs)},
        {"what": "parameters kept", "value": f"{small.params / whole.params:.1%}", "more": human(small.params)},
    ]
    if timings is not None:
        time = f"{1e3 * timings[name].seconds:.1f} ms a batch"
        facts.append({"what": "speed-up", "value": f"{timings[name].speedup:.2f}x", "more": time})
    if answers is not None and answers.accuracy:
        change = 100 * (answers.accuracy[name] - answers.accuracy[dense])
        more = f"{change:+.1f} points to dense"
        facts.append({"what": answers.accuracy_name, "value": f"{answers.accuracy[name]:.1%}", "more": more})
    elif answers is not None:
        what = "same prediction" if answers.kind == "classes" else "same neighbours"
        facts.append({"what": what, "value": f"{answers.agreement(name):.1%}", "more": "as the dense model"})
    layers, full = len(architectures[name].layers), len(architectures[dense].layers)
    width, wide = architectures[name].hidden_size, architectures[dense].hidden_size
    shape = f"{layers} of {full} layers, width {width}" + (f" of {wide}" if width != wide else "")
    shape += "; which ones stayed is not on record, and they are drawn from the bottom" if guessed else ""
    return {"name": name, "facts": facts, "shape": shape}


def _rows(
    names: Sequence[str],
    costs: Mapping[str, Any],
    timings: Mapping[str, Timing] | None,
    answers: Answers | None,
    metrics: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    """The table of all models."""
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        row: dict[str, Any] = {"name": name, **metrics.get(name, {})}
        if answers is not None and answers.accuracy:
            row[answers.accuracy_name] = answers.accuracy[name]
        if answers is not None and i:
            row["same predictions" if answers.kind == "classes" else "same neighbours"] = answers.agreement(name)
            row["output error"] = answers.errors.get(name)
        row |= {"params": costs[name].params, "macs": costs[name].macs}
        if timings is not None:
            row |= {"latency_ms": 1e3 * timings[name].seconds, "speedup": timings[name].speedup}
        rows.append(row)
    return rows


def _budgets(
    names: Sequence[str], budgets: Sequence[Budget], images: int, costs: Mapping[str, Any], answers: Answers | None
) -> dict[str, Any]:
    errors = {} if answers is None else answers.errors
    whole = costs[names[0]].macs
    points = [(name, costs[name].macs / whole, errors.get(name)) for name in names[1:]]
    summary = f"Predicted error falls from {budgets[0].error:.2g} at {budgets[0].share:.0%} of the multiply-adds "
    summary += f"to {budgets[-1].error:.2g} at {budgets[-1].share:.0%}."
    measured = [(name, share, error) for name, share, error in points if error is not None]
    chart = line_chart("error of the output", "multiply-adds kept", budgets, measured, summary)
    cells = [["multiply-adds kept", "predicted error"]]
    cells += [[f"{budget.share:.1%}", f"{budget.error:.3g}"] for budget in budgets]
    return {"chart": chart, "cells": cells, "images": images, "points": measured}


def _latency(names: Sequence[str], timings: Mapping[str, Timing]) -> dict[str, Any]:
    timing = timings[names[0]]
    s = timing.setting
    threads = f", {s['threads']} thread{'s' if s['threads'] > 1 else ''}" if "threads" in s else ""
    rows = []
    for name in names:
        one = timings[name]
        text = f"{1e3 * one.seconds:.2f} ms, {one.speedup:.2f}x"
        rows.append((name, 1e3 * one.seconds, 1e3 * one.spread, text))
    setting = (
        f"Median of {len(timing.samples)} rounds in which the models took turns; the thin line is as long as the "
        f"quartiles are apart. A batch of {s['batch_size']} random images of {' x '.join(map(str, s['image_size']))} "
        f"pixels in {s['dtype']} on {s['device']}{threads}; torch {s['torch']}, transformers {s['transformers']}."
    )
    return {"chart": time_chart("time of a batch", rows), "setting": setting}
