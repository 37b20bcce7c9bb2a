"""Methods that train before they decide: a part of the steps for that, the others to fine-tune."""

from __future__ import annotations

import copy
from typing import Any

from hf_vitprune import NViTConfig, VTPConfig, get_pruning_model
from hf_vitprune.methods import PruningConfig, config_class_of

from ..tasks import Task
from ..training import fit, tune
from .common import GROUP_SIZES, ROUND_TO

#: of the training that decides, and its share of the steps
LEARNING_RATE, SHARE = 3e-4, 0.5


def nvit(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """NViT in two phases: groups go a few at a time, then the small model is fine-tuned."""
    config = NViTConfig(target=budget, group_sizes=GROUP_SIZES, pruning_share=1.0)
    wrapped = get_pruning_model(copy.deepcopy(model), config)
    first = max(1, round(SHARE * steps))
    fit(
        wrapped,
        task,
        first,
        LEARNING_RATE,
        seed,
        what=f"NViT, {first} steps",
        schedule="constant",
        distillation=wrapped.method.traits.distillation,
    )
    return tune(wrapped.export(compensate=False), model, task, steps - first, seed, wrapped.plan())


def vtp(
    model: Any, task: Task, budget: float, steps: int, seed: int, sparsity_weight: float = 1e-4, **settings: Any
) -> Any:
    """VTP: scores that an L1 penalty pulls to zero, then a threshold."""
    config = VTPConfig(
        **settings,
        target=budget,
        sparsity_weight=sparsity_weight,
        sparsity_warmup=0.2,
        gate_learning_rate=2e-2,
        round_to=ROUND_TO,
    )
    return _learned(config, model, task, steps, seed)


def by_goal(name: str, model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Any registered method, with the settings that it chooses for the budget."""
    config = config_class_of(name).from_goal(budget, round_to=ROUND_TO)
    return _learned(config, model, task, steps, seed)


def _learned(config: PruningConfig, model: Any, task: Task, steps: int, seed: int) -> Any:
    wrapped = get_pruning_model(copy.deepcopy(model), config)
    first = max(1, round(SHARE * steps))
    fit(wrapped, task, first, LEARNING_RATE, seed, what=f"{config.method_name}, {first} steps")
    return tune(wrapped.export(compensate=False), model, task, steps - first, seed, wrapped.plan())
