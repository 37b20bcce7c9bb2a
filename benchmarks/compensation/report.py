"""Tables of what the runs gave: accuracy and relative error of the logits, mean over models and draws."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from .methods import METHODS, Goal
from .runs import GOALS, IMAGES

NOTHING = "–"


def tables(records: Iterable[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Subject -> cells: a row a method, a column a goal; points against each run's own dense model, and the error."""
    subjects: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["images"] == IMAGES:
            subjects.setdefault(record["subject"], []).append(record)
    return {subject: _table(mine) for subject, mine in subjects.items()}


def _table(records: list[dict[str, Any]]) -> list[list[str]]:
    dense = {record["seed"]: record["dense"] for record in records}
    cells = [["", "models, runs", *(goal.name for goal in GOALS)]]
    cells.append(["dense", str(len(dense)), *[f"{fmean(dense.values()):.1f} %"] * len(GOALS)])
    for method in METHODS:
        found = [record for record in records if record["method"] == method]
        if found:
            size = f"{len({record['seed'] for record in found})}, {len(found)}"
            cells.append([method, size, *(_cell(found, goal) for goal in GOALS)])
    return cells


def _lost(records: Iterable[dict[str, Any]], goal: Goal) -> list[float]:
    """Points of accuracy that every run gained against its dense model."""
    rows = [(record, row) for record in records for row in record["rows"] if (row["kind"], row["value"]) == goal]
    return [row["accuracy"] - record["dense"] for record, row in rows]


def _cell(records: list[dict[str, Any]], goal: Goal) -> str:
    points = _lost(records, goal)
    if not points:
        return NOTHING
    errors = [row["error"] for record in records for row in record["rows"] if (row["kind"], row["value"]) == goal]
    spread = f" ({min(points):+.1f} to {max(points):+.1f})" if len(points) > 1 else ""
    return f"{fmean(points):+.1f}{spread} / {fmean(errors):.3f}"


def by_images(records: Iterable[dict[str, Any]], method: str = "one-shot") -> list[list[str]]:
    """Accuracy of a method at 25 % of the MACs against the number of images."""
    goal = Goal("macs", 0.25)
    found = [record for record in records if record["method"] == method]
    counts = sorted({record["images"] for record in found})
    cells = [["images", *map(str, counts)]]
    for subject in dict.fromkeys(record["subject"] for record in found):
        mine = [record for record in found if record["subject"] == subject]
        cells.append([subject, *(_cell([r for r in mine if r["images"] == count], goal) for count in counts)])
    return cells


def verdicts(records: Iterable[dict[str, Any]]) -> list[str]:
    """How far the one-shot plan is from the dense model, and Torch-Pruning, subject by subject and budget."""
    lines = []
    records = [record for record in records if record["images"] == IMAGES]
    for subject in dict.fromkeys(record["subject"] for record in records):
        for goal in GOALS[:2]:
            means = {}
            for method in METHODS:
                points = _lost([r for r in records if r["subject"] == subject and r["method"] == method], goal)
                if points:
                    means[method] = fmean(points)
            peers = {method: points for method, points in means.items() if method.endswith("150 steps")}
            best = max(peers, key=lambda method: peers[method], default=None)
            peer = "" if best is None else f"; {best}: {peers[best]:+.2f}"
            if "one-shot" in means:
                mine = [r for r in records if r["subject"] == subject and r["method"] == "one-shot"]
                models = [
                    fmean(_lost([r for r in mine if r["seed"] == seed], goal)) for seed in {r["seed"] for r in mine}
                ]
                worst = f"worst model {min(models):+.2f}, worst run {min(_lost(mine, goal)):+.2f}"
                lines.append(f"{subject}, {goal.name}: one-shot {means['one-shot']:+.2f} points ({worst}){peer}")
    return lines
