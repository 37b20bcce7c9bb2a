"""SPViT and the paper's two baselines: a half of the steps to search, the other half to fine-tune."""

from __future__ import annotations

import copy
import time
from typing import Any

from hf_vitprune import SPViTConfig, get_pruning_model, prune

from ..random_architecture import random_plan
from ..tasks import Task
from ..training import TUNE_DISTILLATION, TUNE_LEARNING_RATE, accuracy, fit, tune
from .common import ROUND_TO

#: of the weights in the search, and its share of the steps
LEARNING_RATE, SHARE = 3e-4, 0.5
#: architectures that random search trains before it chooses (paper: 10)
CANDIDATES = 10


def _search(model: Any, task: Task, budget: float, steps: int, seed: int, **settings: Any) -> Any:
    first = round(SHARE * steps)
    # a gate may come down from its start, and go up again: the paper has 50000 steps at 1e-3 for that
    config = SPViTConfig(target=budget, round_to=ROUND_TO, gate_learning_rate=12 / first, patience=0, **settings)
    started = time.perf_counter()
    wrapped = get_pruning_model(copy.deepcopy(model), config)
    fit(wrapped, task, first, LEARNING_RATE, seed, what=f"{settings or 'SPViT'}, {first} steps", schedule="constant")
    small = wrapped.export(compensate=False)
    small.search_seconds = time.perf_counter() - started
    return tune(small, model, task, steps - first, seed)


def spvit(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Single path: convolutions made of the attention's weights."""
    return _search(model, task, budget, steps, seed)


def shared_gradients(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Single path, by the authors' rule of what the gates learn from."""
    return _search(model, task, budget, steps, seed, gate_gradients="shared")


def topmost_gradients(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Single path; gates below a mixer that is on learn nothing."""
    return _search(model, task, budget, steps, seed, gate_gradients="topmost")


def multi_path(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """The same gates over convolutions with weights of their own."""
    return _search(model, task, budget, steps, seed, single_path=False)


def random_search(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Ten random architectures of the cost, each trained for a share of the search; the best one on the validation
    images goes on.
    """
    started = time.perf_counter()
    each = max(1, round(SHARE * steps) // CANDIDATES)
    best, highest = None, -1.0
    for number in range(CANDIDATES):
        plan = random_plan(model, budget, seed=CANDIDATES * seed + number, round_to=ROUND_TO)
        small = prune(model, plan)
        what = f"random architecture {number + 1} of {CANDIDATES}, {each} steps"
        fit(
            small,
            task,
            each,
            TUNE_LEARNING_RATE,
            seed,
            what=what,
            schedule="constant",
            teacher=model,
            distillation=TUNE_DISTILLATION,
        )
        reached = accuracy(small, task.validation)
        if reached > highest:
            best, highest = small, reached
    assert best is not None
    best.search_seconds = time.perf_counter() - started
    return tune(best.train(), model, task, steps - CANDIDATES * each, seed)
