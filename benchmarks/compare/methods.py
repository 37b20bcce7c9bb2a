"""The methods that are compared: a name and a function each.

A function gets the trained dense model (a copy of its own), the task, the budget (fraction of the MACs that may
remain), the number of optimizer steps that it may take in all, and a seed; it gives the pruned, fine-tuned model. A
method joins with a function here and a line in :data:`METHODS`; one that is registered with ``register_method`` is
known by its name without that.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from hf_vitprune import (
    Architecture,
    NViTConfig,
    OneShotScores,
    PruningPlan,
    SPViTConfig,
    VTPConfig,
    criteria,
    get_pruning_model,
    prune,
)
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.criteria import UnitScores
from hf_vitprune.errors import InvalidConfigError, InvalidPlanError
from hf_vitprune.methods import PruningConfig, config_class_of, method_names
from hf_vitprune.utils.batches import ImageBatches

from ..vtab.depgraph import depgraph_plan
from .random_architecture import random_plan
from .tasks import Task
from .training import TUNE_DISTILLATION, TUNE_LEARNING_RATE, accuracy, fit, tune

Method = Callable[[Any, Task, float, int, int], Any]

#: kept residual channels, q/k and v channels and neurons are a multiple of this: 1, since four of the 64 residual
#: channels are 6 % of the MACs, and no method could be held to a budget
ROUND_TO = 1
GROUP_SIZES = dict.fromkeys(("embedding", "heads", "qk", "v", "mlp"), ROUND_TO)
#: images that scores are made of, and of a batch of them; their gradients count as no step
IMAGES, BATCH_SIZE = 320, 32
#: of the training that decides, and its share of the steps
LEARNING_RATE, SHARE = 3e-4, 0.5
#: architectures that random search trains before it chooses (paper: 10)
CANDIDATES = 10
#: steps of the ratio in which the search for a plan of a budget looks
RATIOS = 200


# ---------------------------------------------------------------------- scores, a plan of the budget, then fine-tuning
def _scored(scope: str, score: Callable[[Any, Task, int], UnitScores]) -> Method:
    def run(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
        scores = score(model, task, seed)
        plan = PruningPlan.from_scores(model, scores, budget, scope=scope, units=None, round_to=ROUND_TO)
        return tune(prune(model, plan), model, task, steps, seed, plan)

    return run


def _images(task: Task) -> ImageBatches:
    return ImageBatches(task.train, BATCH_SIZE, IMAGES)


def _taylor(model: Any, task: Task, seed: int) -> UnitScores:
    return criteria.taylor(model, _images(task))


def one_shot(model: Any, task: Task, budget: float, steps: int, seed: int, uniform: bool = False) -> Any:
    """One-shot scores and compensation from the training images: no steps are taken."""
    scores = OneShotScores.measure(model, _images(task))
    return prune(model, scores.plan(budget, round_to=ROUND_TO, uniform=uniform), calibration=_images(task))


def torch_pruning(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Torch-Pruning's group Taylor pruning: channels of heads, neurons and residual channels by one ratio.

    It finds nothing to prune in Swin. The gradients of ten batches that its scores need count as no step.
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
        between.append(replace(over, layers=(*over.layers[:i], *under.layers[i:]), info=under.info))
    between.append(under)
    return min(between, key=lambda plan: abs(meter.ratio(plan.architecture) - budget)).validated()


# ---------------------------------------------------------------------- a part of the steps decides, the others tune
def _learned(
    config: PruningConfig,
    model: Any,
    task: Task,
    steps: int,
    seed: int,
    schedule: str = "cosine",
    taught: bool = False,
) -> Any:
    """``taught``: while it decides, by the distillation that the method's authors use."""
    first = max(1, round(SHARE * steps))
    started = time.perf_counter()
    wrapped = get_pruning_model(copy.deepcopy(model), config)
    lesson = wrapped.method.traits.distillation if isinstance(config, NViTConfig) else None  # as its authors teach it
    what = f"{config.method_name}, {first} steps"
    fit(wrapped, task, first, LEARNING_RATE, seed, what=what, schedule=schedule, distillation=lesson)
    small = wrapped.export(compensate=False)
    small.search_seconds = time.perf_counter() - started
    return tune(small, model, task, steps - first, seed, wrapped.plan())


def nvit(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """NViT in two phases: groups go a few at a time, then the small model is fine-tuned."""
    config = NViTConfig(target=budget, group_sizes=GROUP_SIZES, pruning_share=1.0)
    return _learned(config, model, task, steps, seed, "constant")


def vtp(model: Any, task: Task, budget: float, steps: int, seed: int, **settings: Any) -> Any:
    """VTP: scores that an L1 penalty pulls to zero, then a threshold."""
    own = {"sparsity_weight": 1e-4, "sparsity_warmup": 0.2, "gate_learning_rate": 2e-2, "round_to": ROUND_TO}
    return _learned(VTPConfig(target=budget, **(own | settings)), model, task, steps, seed)


def by_goal(name: str, model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Any registered method, with the settings that it chooses for the budget."""
    return _learned(config_class_of(name).from_goal(budget, round_to=ROUND_TO), model, task, steps, seed)


def spvit(model: Any, task: Task, budget: float, steps: int, seed: int, **settings: Any) -> Any:
    """SPViT: half of the steps search, half fine-tune; by default one path, of which every gate learns by itself."""
    # a gate may come down from its start, and go up again: the paper has 50000 steps at 1e-3 for that
    rate = 12 / round(SHARE * steps)
    config = SPViTConfig(target=budget, round_to=ROUND_TO, gate_learning_rate=rate, patience=0, **settings)
    return _learned(config, model, task, steps, seed, "constant")


def random_search(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
    """Ten random architectures of the cost, each trained for a share of the search; the best one on the validation
    images goes on.
    """
    started = time.perf_counter()
    each = max(1, round(SHARE * steps) // CANDIDATES)
    best, highest = None, -1.0
    for number in range(CANDIDATES):
        small = prune(model, random_plan(model, budget, seed=CANDIDATES * seed + number, round_to=ROUND_TO))
        what = f"random architecture {number + 1} of {CANDIDATES}, {each} steps"
        learned = {"schedule": "constant", "teacher": model, "distillation": TUNE_DISTILLATION}
        fit(small, task, each, TUNE_LEARNING_RATE, seed, what=what, **learned)
        reached = accuracy(small, task.validation)
        if reached > highest:
            best, highest = small, reached
    assert best is not None
    best.search_seconds = time.perf_counter() - started
    return tune(best.train(), model, task, steps - CANDIDATES * each, seed)


METHODS: dict[str, Method] = {
    "random": _scored("local", lambda model, task, seed: criteria.random(model, seed)),
    "magnitude": _scored("local", lambda model, task, seed: criteria.magnitude(model)),
    "activation": _scored("local", lambda model, task, seed: criteria.activation(model, _images(task))),
    "taylor": _scored("local", _taylor),
    "taylor-global": _scored("global", _taylor),
    "taylor-isomorphic": _scored("isomorphic", _taylor),
    "one-shot": one_shot,
    "one-shot-uniform": partial(one_shot, uniform=True),
    "torch-pruning": torch_pruning,
    "vtp": vtp,
    "vtp-uniform": partial(vtp, uniform=True),
    "vtp-1e-3": partial(vtp, sparsity_weight=1e-3),
    "vtp-1e-5": partial(vtp, sparsity_weight=1e-5),
    "nvit": nvit,
    "spvit": spvit,
    "spvit-shared": partial(spvit, gate_gradients="shared"),  # by the authors' rule of what the gates learn from
    "spvit-topmost": partial(spvit, gate_gradients="topmost"),  # gates below a mixer that is on learn nothing
    "spvit-multi-path": partial(spvit, single_path=False),  # convolutions with weights of their own
    "spvit-random-search": random_search,
}


def _unlabelled(method: Method) -> Method:
    """The method on the same images without labels: features of the dense model are all that it learns from."""

    @wraps(method)
    def run(model: Any, task: Task, budget: float, steps: int, seed: int) -> Any:
        return method(model, task.unlabelled(), budget, steps, seed)

    return run


#: of those that need no labels
FEATURES = "-features"
METHODS |= {name + FEATURES: _unlabelled(METHODS[name]) for name in ("magnitude", "vtp", "nvit", "spvit")}


def method_named(name: str) -> Method:
    """The method of this name."""
    if name in METHODS:
        return METHODS[name]
    if name not in method_names():
        raise InvalidConfigError(f"methods are {', '.join(dict.fromkeys([*METHODS, *method_names()]))}; not {name}")
    return partial(by_goal, name)
