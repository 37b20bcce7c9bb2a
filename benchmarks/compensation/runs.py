"""Runs: one JSON file each, none is done twice."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_vitprune import OneShotScores
from hf_vitprune.methods import OneShotSettings

from ..common import once
from ..trained import accuracy_of, logits_of, read, trained
from .methods import METHODS, Given, Goal, cost_ratio

GOALS = [Goal("macs", 0.5), Goal("macs", 0.25), Goal("units", 0.3), Goal("units", 0.5), Goal("units", 0.75)]
IMAGES = 128


class Run(NamedTuple):
    """One method on one model with one draw of calibration images, at all goals."""

    subject: str
    seed: int
    draw: int
    method: str
    images: int = IMAGES

    def path(self, folder: Path) -> Path:
        name = re.sub(r"\W+", "-", f"{self.subject}-{self.method}-{self.images}-{self.seed}-{self.draw}".lower())
        return folder / "runs" / f"{name}.json"


def runs_of(subjects: Sequence[str], methods: Sequence[str], seeds: int, draws: int, images: int) -> list[Run]:
    runs = []
    for seed, subject, method in itertools.product(range(seeds), subjects, methods):
        known = METHODS[method]
        if known.swin or "Swin" not in subject:
            runs += [Run(subject, seed, draw, method, images) for draw in range(draws if known.draws else 1)]
    return runs


def draw_of(pixels: torch.Tensor, images: int, draw: int) -> torch.Tensor:
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(1000 + draw))
    return pixels[order[:images]]


def do_run(run: Run, models: Path) -> dict[str, Any]:
    """Prune to every goal, and compare with the dense model on the test images."""
    dense, data = trained(run.subject, run.seed, models), read(run.subject)
    test = data["test"]
    expected = logits_of(dense, test.pixels)
    images = draw_of(data["train"].pixels, run.images, run.draw)
    scores = None
    if run.method.startswith("one-shot"):
        scores = OneShotScores.measure(dense, images, OneShotSettings(images=None))
    rows = []
    for goal in GOALS:
        if goal.kind == "units" and run.method.startswith("Torch-Pruning"):
            continue
        torch.manual_seed(run.seed)
        start = time.perf_counter()
        small = METHODS[run.method].run(Given(dense, images, data["train"], goal, scores))
        seconds = time.perf_counter() - start
        logits = logits_of(small, test.pixels)
        row = {"kind": goal.kind, "value": goal.value, "accuracy": accuracy_of(logits, test.labels)}
        row |= {"error": float((logits - expected).norm() / expected.norm()), "macs_ratio": cost_ratio(small, dense)}
        rows.append({**row, "seconds": round(seconds, 2)})
    return {**run._asdict(), "dense": accuracy_of(expected, test.labels), "rows": rows, "torch": torch.__version__}


def do_all(runs: Sequence[Run], folder: Path, models: Path) -> Iterator[tuple[Run, dict[str, Any] | None]]:
    """Every run with what it gave; None where it had been done before."""
    for run in runs:
        done = run.path(folder).is_file()
        record = once(run.path(folder), partial(do_run, run, models))
        yield run, None if done else record


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
