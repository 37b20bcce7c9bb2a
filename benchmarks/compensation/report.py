"""Tables of what the runs gave: accuracy and relative error of the logits, mean over models and draws."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from .methods import METHODS, Goal
from .runs import GOALS, IMAGES

NOTHING = "–"


def tables(records: Iterable[dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Subject -> cells: a row a method, a column a goal. Accuracy is the mean over models of the mean over draws."""
    subjects: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["images"] == IMAGES:
            subjects.setdefault(record["subject"], []).append(record)
    return {subject: _table(mine) for subject, mine in subjects.items()}


def _table(records: list[dict[str, Any]]) -> list[list[str]]:
    dense = {record["seed"]: record["dense"] for record in records}
    cells = [["", *(goal.name for goal in GOALS)], ["dense", *[f"{fmean(dense.values()):.1f}"] * len(GOALS)]]
    for method in METHODS:
        found = [record for record in records if record["method"] == method]
        if found:
            cells.append([method, *(_cell(found, goal) for goal in GOALS)])
    return cells


def _cell(records: list[dict[str, Any]], goal: Goal) -> str:
    rows = [row for record in records for row in record["rows"] if (row["kind"], row["value"]) == goal]
    if not rows:
        return NOTHING
    accuracies = [row["accuracy"] for row in rows]
    spread = f" ({min(accuracies):.1f}..{max(accuracies):.1f})" if len(rows) > 1 else ""
    return f"{fmean(accuracies):.1f}{spread} / {fmean(row['error'] for row in rows):.3f}"


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
    """How far the one-shot plan is from the dense model and from Torch-Pruning, subject by subject and budget."""
    lines = []
    records = [record for record in records if record["images"] == IMAGES]
    for subject in dict.fromkeys(record["subject"] for record in records):
        for goal in GOALS[:2]:
            means = {}
            for method in METHODS:
                mine = [r for r in records if r["subject"] == subject and r["method"] == method]
                rows = [x for r in mine for x in r["rows"] if (x["kind"], x["value"]) == goal]
                if rows:
                    means[method] = fmean(row["accuracy"] for row in rows)
            mine = [r for r in records if r["subject"] == subject and r["method"] == "one-shot"]
            if not mine:
                continue
            lost = fmean(r["dense"] for r in mine) - means["one-shot"]
            peers = {m: a for m, a in means.items() if m.endswith("150 steps")}
            best = max(peers, key=lambda m: peers[m], default=None)
            peer = "" if best is None else f"; {means['one-shot'] - peers[best]:+.2f} against {best}"
            lines.append(f"{subject}, {goal.name}: {lost:.2f} points under dense{peer}")
    return lines
