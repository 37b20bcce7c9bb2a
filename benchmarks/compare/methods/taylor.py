"""Torch-Pruning's group Taylor pruning of the same stock model, then fine-tuning."""

from __future__ import annotations

from typing import Any

from hf_vitprune import prune

from ...vtab.depgraph import depgraph_plan
from ..tasks import Task
from ..training import tune
from .common import ROUND_TO, plan_of_budget


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
