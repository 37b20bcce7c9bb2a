"""Baselines: units of every set cut by one ratio before any step, then fine-tuning."""

from __future__ import annotations

from typing import Any

from hf_vitprune import PruningPlan, prune

from ..tasks import Task
from ..training import tune
from .common import ROUND_TO, plan_of_budget


def random_units(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Units drawn at random."""
    plan = plan_of_budget(model, budget, lambda ratio: PruningPlan.random(model, ratio, round_to=ROUND_TO, seed=seed))
    return tune(prune(model, plan), model, task, steps, seed)


def magnitude(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Units of the smallest weights (L2 norm)."""
    plan = plan_of_budget(model, budget, lambda ratio: PruningPlan.magnitude(model, ratio, round_to=ROUND_TO))
    return tune(prune(model, plan), model, task, steps, seed)
