"""Ways to a tower of some share of the MACs: each a function of the dense one, images, a target and their size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_vitprune import Architecture, Compensation, OneShotScores, PruningPlan, count, prune
from hf_vitprune import criteria as scores_of
from hf_vitprune.errors import UnreachableTargetError
from hf_vitprune.methods import OneShotSettings

Method = Callable[[Any, torch.Tensor, float, int], Any]


def scored(model: Any, images: torch.Tensor) -> OneShotScores:
    """One-shot scores from all of the images."""
    return OneShotScores.measure(model, images, OneShotSettings(images=None, statistics=False))


def one_shot(scores: Callable[[], OneShotScores], round_to: int, settings: Compensation) -> Method:
    """Sizes by the scores, then compensation."""

    def method(model: Any, images: torch.Tensor, target: float, size: int) -> Any:
        plan = scores().plan(target, image_size=size, round_to=round_to)
        return prune(model, plan, calibration=images, compensate=settings)

    return method


def magnitude(settings: Compensation | None, round_to: int) -> Method:
    """Units with the smallest weights of every set; then compensation, or slices as they are for None."""

    def method(model: Any, images: torch.Tensor, target: float, size: int) -> Any:
        plan = PruningPlan.from_scores(
            model,
            scores_of.magnitude(model),
            target,
            scope="local",
            units=("qk", "v", "mlp"),
            round_to=round_to,
            image_size=size,
        )
        if settings is None:
            return prune(model, plan)
        return prune(model, plan, calibration=images, compensate=settings)

    return method


def depth(settings: Compensation) -> Method:
    """The first layers, as many as the target allows; the last of them takes over what it can of those above."""

    def method(model: Any, images: torch.Tensor, target: float, size: int) -> Any:
        source = Architecture.of(model)
        most = target * count(source, image_size=size).macs
        for kept in range(len(source.layers) - 1, 0, -1):
            plan = PruningPlan.dense(model).keep_layers(range(kept))
            if count(plan.architecture, image_size=size).macs <= most:
                return prune(model, plan, calibration=images, compensate=settings)
        raise UnreachableTargetError(f"one layer costs more than {target} of the MACs")

    return method


def methods(scores: Callable[[], OneShotScores], round_to: int, settings: Compensation) -> dict[str, Method]:
    """All of them, by name.

    Args:
        scores: gives the one-shot scores.
    """
    return {
        "one-shot": one_shot(scores, round_to, settings),
        "magnitude, compensated": magnitude(settings, round_to),
        "magnitude": magnitude(None, round_to),
        "depth, compensated": depth(settings),
    }
