"""Baselines: scores of the units, a plan of the budget, then fine-tuning; nothing is learned in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_vitprune import OneShotScores, PruningPlan, criteria, prune
from hf_vitprune.criteria import UnitScores
from hf_vitprune.utils.batches import ImageBatches

from ..tasks import Task
from ..training import tune
from .common import ROUND_TO

#: images that scores are made of, and of a batch of them; their gradients count as no step
IMAGES, BATCH_SIZE = 320, 32


def _scored(scope: str, score: Callable[[Any, Task, int], UnitScores]) -> Callable[[Any, Task, float, int, int], Any]:
    """The method that prunes to the budget by these scores."""

    def run(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
        scores = score(model, task, seed)
        plan = PruningPlan.from_scores(model, scores, budget, scope=scope, units=None, round_to=ROUND_TO)
        return tune(prune(model, plan), model, task, steps, seed, plan)

    return run


def _images(task: Task) -> ImageBatches:
    return ImageBatches(task.train, BATCH_SIZE, IMAGES)


def _taylor(model: Any, task: Task, seed: int) -> UnitScores:
    return criteria.taylor(model, _images(task))


random_units = _scored("local", lambda model, task, seed: criteria.random(model, seed))
magnitude = _scored("local", lambda model, task, seed: criteria.magnitude(model))
activation = _scored("local", lambda model, task, seed: criteria.activation(model, _images(task)))
taylor = _scored("local", _taylor)
taylor_global = _scored("global", _taylor)
taylor_isomorphic = _scored("isomorphic", _taylor)


def one_shot(model: Any, task: Task, budget: float, steps: int, seed: int, uniform: bool = False) -> Any:
    """One-shot scores and compensation from the training images: no steps are taken."""
    scores = OneShotScores.measure(model, _images(task))
    return prune(model, scores.plan(budget, round_to=ROUND_TO, uniform=uniform), calibration=_images(task))
