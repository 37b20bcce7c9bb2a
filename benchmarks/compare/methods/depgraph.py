"""Torch-Pruning's group Taylor pruning of the same stock model, then fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_vitprune import Architecture, PruningPlan, prune
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.errors import InvalidPlanError

from ...vtab.depgraph import depgraph_plan
from ..tasks import Task
from ..training import tune
from .common import ROUND_TO

#: steps of the ratio in which its search looks
RATIOS = 200


def torch_pruning_taylor(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Channels of heads, neurons and residual channels by one ratio, before any step.

    The gradients of ten batches that the scores need count as no step.

    Raises:
        MissingExtraError: Torch-Pruning is not installed.
        UnsupportedModelError: it finds nothing to prune (Swin).
    """
    plan = plan_of_budget(
        model, budget, lambda ratio: depgraph_plan(model, task.train, ratio, round_to=ROUND_TO, embedding=True)
    )
    return tune(prune(model, plan), model, task, steps, seed)


def plan_of_budget(model: Any, budget: float, plan_at: Callable[[float], PruningPlan]) -> PruningPlan:
    """The plan of about this cost from a method that cuts every set by the same ratio.

    Rounded sizes of all layers jump together. So the layers of the last plan over the budget take, one after the
    other, the sizes of the first plan under it; the nearest to the budget is taken.

    Args:
        budget: fraction of the model's MACs.
        plan_at: ratio in (0, 1) -> plan; a higher one keeps a part of what a lower one keeps.
    """
    meter = ClosedFormMeter("macs", Architecture.of(model))

    def attempt(step: int) -> PruningPlan | None:
        try:
            return plan_at(step / RATIOS)
        except InvalidPlanError:  # removes nothing yet, or empties a set
            return None

    low, high = 0, RATIOS
    over, under = PruningPlan.dense(model), None
    while high - low > 1:
        middle = (low + high) // 2
        plan = attempt(middle)
        if plan is None:
            low, high = (middle, high) if middle < RATIOS // 2 else (low, middle)
        elif meter.ratio(plan.architecture) > budget:
            low, over = middle, plan
        else:
            high, under = middle, plan
    if under is None:
        raise InvalidPlanError(f"no ratio comes down to {budget} of the MACs")
    between = [over]
    for i in reversed(range(len(over.layers))):
        layers = (*over.layers[:i], *under.layers[i:])
        between.append(replace(over, layers=layers, info=under.info))
    between.append(under)
    return min(between, key=lambda plan: abs(meter.ratio(plan.architecture) - budget)).validated()
