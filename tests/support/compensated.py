"""What tests of compensated models measure."""

from __future__ import annotations

from typing import Any

import torch

from hf_vitprune import PruningPlan
from tiny import images, run


def pixels(count: int = 64, seed: int = 1) -> torch.Tensor:
    return images(count, seed=seed).double()


def logits(model: Any, images: torch.Tensor) -> torch.Tensor:
    return run(model, images)["logits"]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the mean square."""
    return float((actual - expected).norm() / expected.norm())


def fits(plan: PruningPlan) -> list[dict[str, Any]]:
    return plan.info["compensation"]["fits"]
