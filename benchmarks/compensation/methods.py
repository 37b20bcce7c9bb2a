"""What is compared. A function gets a trained model, calibration images, labelled training images and a goal.

All but the one-shot methods cut every set of q/k channels, v channels and MLP neurons by the same ratio; heads stay. A
goal is that ratio, or a fraction of the MACs that may remain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_vitprune import Architecture, Compensation, OneShotScores, PruningPlan, count, prune
from hf_vitprune.methods import OneShotSettings

from ..compare.methods import plan_of_budget
from ..trained import Split, fit
from ..vtab.depgraph import depgraph_plan

UNITS = ["qk", "v", "mlp"]
#: kept sizes of every method are a multiple of this
ROUND_TO = 1
#: of the fine-tuning that Torch-Pruning gets: AdamW, one cycle
TUNE_STEPS, TUNE_LEARNING_RATE = 150, 5e-4


class Goal(NamedTuple):
    """``units``: share of units removed from every set. ``macs``: share of the MACs that may remain."""

    kind: str
    value: float

    @property
    def name(self) -> str:
        return f"{self.value:.0%} of {'units removed' if self.kind == 'units' else 'MACs'}"


class Given(NamedTuple):
    """What a method may look at."""

    model: Any
    images: torch.Tensor
    train: Split
    goal: Goal
    scores: OneShotScores | None = None


def uniform(given: Given, scored: Any = None) -> PruningPlan:
    """The ratio of the goal, or the one that gives its MACs, by the weights of ``scored``."""
    by = given.model if scored is None else scored

    def at(ratio: float) -> PruningPlan:
        return PruningPlan.magnitude(by, ratio, UNITS, round_to=ROUND_TO)

    return at(given.goal.value) if given.goal.kind == "units" else plan_of_budget(given.model, given.goal.value, at)


def sliced(given: Given) -> Any:
    return prune(given.model, uniform(given))


def taylor(given: Given) -> Any:
    """Squared Taylor scores of the task loss (weight times gradient), over the labelled training images."""
    weighted = copy.deepcopy(given.model)
    for part in range(0, min(len(given.train.labels), 640), 64):
        batch = given.train.part(slice(part, part + 64))
        nn.functional.cross_entropy(weighted(pixel_values=batch.pixels).logits, batch.labels).backward()
    with torch.no_grad():
        for parameter in weighted.parameters():
            parameter.mul_(0 if parameter.grad is None else parameter.grad)
    return prune(given.model, uniform(given, weighted))


def compensated(given: Given, parts: tuple[str, ...] | None, reselect: bool) -> Any:
    settings = Compensation(reselect=reselect) if parts is None else Compensation(parts=parts, reselect=reselect)
    return prune(given.model, uniform(given), calibration=given.images, compensate=settings)


def one_shot(given: Given, statistics: bool) -> Any:
    """The same MACs as the uniform plan where the goal is units. ``statistics``: new weights from the file alone."""
    scores = given.scores or OneShotScores.measure(given.model, given.images, OneShotSettings(images=None))
    target = given.goal.value
    if given.goal.kind == "units":
        target = count(uniform(given).architecture).macs / count(given.model).macs
    plan = scores.plan(target, round_to=ROUND_TO)
    if statistics:
        return prune(given.model, scores.compensate(given.model, plan))
    return prune(given.model, plan, calibration=given.images)


def torch_pruning(given: Given, importance: str, steps: int) -> Any:
    examples = [{"pixel_values": x, "labels": int(y)} for x, y in zip(*given.train, strict=True)]

    def at(ratio: float) -> PruningPlan:
        return depgraph_plan(given.model, examples, ratio, round_to=ROUND_TO, importance=importance)

    goal = given.goal
    plan = at(goal.value) if goal.kind == "units" else plan_of_budget(given.model, goal.value, at)
    small = prune(given.model, plan)
    return fit(small, given.train, steps, TUNE_LEARNING_RATE, what=f"fine-tuning, {steps} steps") if steps else small


class Method(NamedTuple):
    """``draws``: depends on the calibration images. ``swin``: Torch-Pruning does not take Swin."""

    run: Callable[[Given], Any]
    draws: bool = True
    swin: bool = True


METHODS = {
    "magnitude": Method(sliced, draws=False),
    "Taylor": Method(taylor, draws=False),
    "magnitude + fold": Method(partial(compensated, parts=("mlp",), reselect=False)),
    "OBS + fold": Method(partial(compensated, parts=("mlp",), reselect=True)),
    "low rank": Method(partial(compensated, parts=None, reselect=True)),
    "one-shot": Method(partial(one_shot, statistics=False)),
    "one-shot, from its file": Method(partial(one_shot, statistics=True)),
    "Torch-Pruning, Taylor": Method(partial(torch_pruning, importance="taylor", steps=0), draws=False, swin=False),
    "Torch-Pruning, L2": Method(partial(torch_pruning, importance="l2", steps=0), draws=False, swin=False),
    "Torch-Pruning, Taylor, 150 steps": Method(
        partial(torch_pruning, importance="taylor", steps=TUNE_STEPS), draws=False, swin=False
    ),
    "Torch-Pruning, L2, 150 steps": Method(
        partial(torch_pruning, importance="l2", steps=TUNE_STEPS), draws=False, swin=False
    ),
}


def cost_ratio(small: Any, dense: Any) -> float:
    return count(Architecture.of(small)).macs / count(dense).macs
