"""The methods that are compared: a name and a function each.

A function gets the trained dense model (a copy of its own), the task, the budget (fraction of the MACs that may
remain), the number of optimizer steps that it may take in all, and a seed; it gives the pruned, fine-tuned model. A
method joins with a function in a file of this folder and a line in :data:`METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..tasks import Task
from .baselines import magnitude, random_units
from .learned import nvit, vtp
from .spvit import multi_path, random_search, shared_gradients, spvit, topmost_gradients
from .taylor import torch_pruning_taylor

Method = Callable[[Any, Task, float, int, int], Any]

METHODS: dict[str, Method] = {
    "random": random_units,
    "magnitude": magnitude,
    "torch-pruning": torch_pruning_taylor,
    "vtp": vtp,
    "nvit": nvit,
    "spvit": spvit,
    "spvit-shared": shared_gradients,
    "spvit-topmost": topmost_gradients,
    "spvit-multi-path": multi_path,
    "spvit-random-search": random_search,
}
