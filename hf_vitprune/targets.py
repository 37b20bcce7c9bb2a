"""From a target cost to a plan: the same search for every method that can give plans of any strength."""

from __future__ import annotations

from collections.abc import Callable

from .architecture import Architecture
from .cost import count
from .errors import UnreachableTargetError
from .plan import PruningPlan

ImageSize = int | tuple[int, int] | None


def cost_ratio(architecture: Architecture, dense: Architecture, metric: str, image_size: ImageSize = None) -> float:
    """Cost of an architecture as a fraction of another's. ``metric``: ``macs`` or ``params``."""
    return getattr(count(architecture, image_size), metric) / getattr(count(dense, image_size), metric)


def reach_target(
    plan_at: Callable[[int], PruningPlan],
    strongest: int,
    target: float,
    metric: str,
    image_size: ImageSize = None,
) -> PruningPlan:
    """The weakest plan whose cost is at most ``target`` of the source's.

    Args:
        plan_at: plan of strength 0 (nothing removed) .. ``strongest``; cost falls with strength, up to rounding.
        target: fraction of the source's cost that may remain.
        metric: ``macs`` or ``params``.

    Raises:
        UnreachableTargetError: not even the strongest plan reaches it; the message says what can be reached.
    """

    def ratio(strength: int) -> float:
        plan = plan_at(strength)
        return cost_ratio(plan.architecture, plan.source, metric, image_size)

    lowest = ratio(strongest)
    if lowest > target:
        raise UnreachableTargetError(
            f"a target of {target:.3f} of the {metric} cannot be reached: the smallest model these settings allow has "
            f"{lowest:.3f}. Raise the target, or lower the floors (round_to, points)."
        )
    low, high = 0, strongest  # cost(low) > target >= cost(high)
    while high - low > 1:
        middle = (low + high) // 2
        if ratio(middle) > target:
            low = middle
        else:
            high = middle
    return plan_at(high)
