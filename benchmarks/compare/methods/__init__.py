"""The methods that are compared: a name and a function each.

A function gets the trained dense model (a copy of its own), the task, the budget (fraction of the MACs that may
remain), the number of optimizer steps that it may take in all, and a seed; it gives the pruned, fine-tuned model. A
method joins with a function in a file of this folder and a line in :data:`METHODS`; one that is registered with
``register_method`` is known by its name without that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from hf_vitprune.errors import InvalidConfigError
from hf_vitprune.methods import method_names

from ..tasks import Task
from .baselines import activation, magnitude, one_shot, random_units, taylor, taylor_global, taylor_isomorphic
from .depgraph import torch_pruning_taylor
from .learned import by_goal, nvit, vtp
from .spvit import multi_path, random_search, shared_gradients, spvit, topmost_gradients

Method = Callable[[Any, Task, float, int, int], Any]

METHODS: dict[str, Method] = {
    "random": random_units,
    "magnitude": magnitude,
    "activation": activation,
    "taylor": taylor,
    "taylor-global": taylor_global,
    "taylor-isomorphic": taylor_isomorphic,
    "one-shot": one_shot,
    "one-shot-uniform": partial(one_shot, uniform=True),
    "torch-pruning": torch_pruning_taylor,
    "vtp": vtp,
    "vtp-uniform": partial(vtp, uniform=True),
    "vtp-1e-3": partial(vtp, sparsity_weight=1e-3),
    "vtp-1e-5": partial(vtp, sparsity_weight=1e-5),
    "nvit": nvit,
    "spvit": spvit,
    "spvit-shared": shared_gradients,
    "spvit-topmost": topmost_gradients,
    "spvit-multi-path": multi_path,
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
    """The method of this name.

    Raises:
        InvalidConfigError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    if name not in method_names():
        raise InvalidConfigError(f"methods are {', '.join(dict.fromkeys([*METHODS, *method_names()]))}; not {name}")
    return partial(by_goal, name)
