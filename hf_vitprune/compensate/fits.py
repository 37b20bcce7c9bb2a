"""Fits of single Linears: what one reads (a fold of its inputs) and what one writes (a refit of its weights)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .algebra import ridge_solve
from .moments import Statistics

#: LayerScale factors below this share of the largest are left alone: their rows would be divided by almost nothing
SMALLEST_SCALE = 1e-6


class Fit(NamedTuple):
    """New weights of a Linear, and its relative error (root of lost over total variance) before and after.

    ``starved``: there were fewer rows than features.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    before: float
    after: float
    ridge: float
    starved: bool


#: rows for each feature from which on the ridge is the one that was asked for
ROWS_A_FEATURE = 20


def damping(stats: Statistics, ridge: float) -> float:
    """The ridge for these statistics: the fewer rows there are for each feature, the larger."""
    return ridge * max(1.0, ROWS_A_FEATURE * len(stats.xx) / stats.rows)


def fold(stats: Statistics, prior: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Map (m, n) and constant (m,) from the features that stay to all that there were.

    Args:
        stats: of kept features (n) and, as targets, of all (m).
        prior: (m, n) what is used without a fold; the fit shrinks towards it.
    """
    found = prior + ridge_solve(stats.xx, stats.tx - prior @ stats.xx, damping(stats, ridge))[0]
    return found, stats.t - found @ stats.x


def refit(stats: Statistics, weight: torch.Tensor, scale: torch.Tensor | None, ridge: float) -> Fit:
    """Weights of a Linear that bring its output, times LayerScale, closest to the targets.

    Args:
        stats: of its inputs (n) and of what it should add to the residual stream (m).
        weight: (m, n) it starts from, and shrinks towards.
        scale: (m,) LayerScale behind it.
    """
    factors = torch.ones_like(stats.t) if scale is None else scale.to(stats.t)
    prior = factors[:, None] * weight
    damped = damping(stats, ridge)
    missing = stats.tx - prior @ stats.xx
    step, left = ridge_solve(stats.xx, missing, damped)
    found = prior + step
    bias = stats.t - found @ stats.x
    usable = factors.abs() > SMALLEST_SCALE * factors.abs().max()
    divisor = torch.where(usable, factors, torch.ones_like(factors))
    new = torch.where(usable[:, None], found / divisor[:, None], weight)
    starved = stats.rows < len(stats.xx)
    before, after = (
        (lost / stats.tt.sum().clamp(min=torch.finfo(lost.dtype).tiny)).sqrt()
        for lost in (squared_error(stats, prior, missing), squared_error(stats, found, left))
    )
    return Fit(new, torch.where(usable, bias / divisor, 0.0), float(before), float(after), damped, starved)


def squared_error(stats: Statistics, weight: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """Of ``weight`` (m, n), over all targets, where ``left`` is ``stats.tx - weight @ stats.xx``."""
    return (stats.tt.sum() - (weight * (stats.tx + left)).sum()).clamp(min=0)
