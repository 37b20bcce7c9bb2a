"""Runs: a file each, none is done twice."""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from hf_vitprune import Architecture, count
from hf_vitprune.errors import InvalidDataError

from .methods import method_named
from .models import dense_model
from .tasks import load_task
from .training import accuracy

#: a pruned model's MACs may be off the budget by this share of it
TOLERANCE = 0.03
DENSE = "dense"


@dataclass(frozen=True)
class Run:
    """One cell of a table; ``budget``: fraction of the dense MACs, ``steps``: of pruning and fine-tuning together."""

    family: str
    task: str
    method: str
    budget: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.family}-{self.task}-{self.method}-{self.budget:g}-{self.steps}-seed{self.seed}"


def runs_of(
    families: Sequence[str],
    tasks: Sequence[str],
    methods: Sequence[str],
    budgets: Sequence[float],
    steps: int,
    seeds: Sequence[int],
) -> list[Run]:
    """All cells, and the dense model's, seed by seed."""
    for method in methods:
        method_named(method)
    runs = []
    for family, task, seed in itertools.product(families, tasks, seeds):
        runs.append(Run(family, task, DENSE, 1.0, 0, seed))
        runs += [Run(family, task, method, budget, steps, seed) for budget in budgets for method in methods]
    return runs


def do_run(run: Run, folder: Path) -> dict[str, Any]:
    """Prune, fine-tune and test."""
    task = load_task(run.task)
    dense = dense_model(run.family, task, run.seed, folder / "dense")
    started = time.perf_counter()
    set_seed(run.seed)
    small = dense
    if run.method != DENSE:
        small = method_named(run.method)(copy.deepcopy(dense), task, run.budget, run.steps, run.seed)
    ratio = count(small).macs / count(dense).macs
    if abs(ratio / run.budget - 1) > TOLERANCE:
        raise InvalidDataError(f"{run.name}: {ratio:.3f} of the MACs stay, over {TOLERANCE:.0%} off the budget")
    return {
        **asdict(run),
        "accuracy": accuracy(small, task.test),
        "validation": accuracy(small, task.validation),
        "macs_ratio": ratio,
        "params_ratio": count(small).params / count(dense).params,
        "architecture": Architecture.of(small).to_dict(),
        "search_seconds": getattr(small, "search_seconds", None),
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
    }


def name_of(record: dict[str, Any]) -> str:
    """Name of the run that gave a record."""
    return Run(**{name: record[name] for name in Run.__dataclass_fields__}).name


def path_of(run: Run, folder: Path) -> Path:
    return folder / "runs" / f"{run.name}.json"


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """What the runs gave, in the order of their names."""
    for path in sorted((folder / "runs").glob("*.json")):
        try:
            yield json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InvalidDataError(f"{path} is damaged ({error}): delete it, and run again") from error
