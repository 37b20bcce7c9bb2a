"""What methods share: sizes are rounded alike, and land on the budget alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_vitprune import Architecture, PruningPlan
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.errors import InvalidPlanError

#: kept residual channels, q/k and v channels and neurons are a multiple of this: 1, since four of the 64 residual
#: channels are 6 % of the MACs, and no method could be held to a budget
ROUND_TO = 1
GROUP_SIZES = {"embedding": ROUND_TO, "heads": 1, "qk": ROUND_TO, "v": ROUND_TO, "mlp": ROUND_TO}
#: steps of the ratio in which its search looks
RATIOS = 200


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
