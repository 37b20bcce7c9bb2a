"""From a target cost to a plan: the same search for every method that can give plans of any strength."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from ..cost.meter import CostMeter
from ..errors import UnreachableTargetError
from ..spec.architecture import Architecture


class _Plan(Protocol):
    @property
    def architecture(self) -> Architecture: ...


P = TypeVar("P", bound=_Plan)


def reach_target(plan_at: Callable[[int], P], strongest: int, target: float, meter: CostMeter) -> P:
    """The weakest plan whose cost is at most ``target`` of the source's.

    Args:
        plan_at: plan of strength 0 (nothing removed) .. ``strongest``; cost falls with strength, up to rounding.
        target: fraction of the source's cost that may remain.
        meter: what cost is; its reference is the plans' source.

    Raises:
        UnreachableTargetError: not even the strongest plan reaches it; the message says what can be reached.
        LatencyTableError: the meter's latency table does not cover a plan's sizes.
    """

    def ratio(strength: int) -> float:
        return meter.ratio(plan_at(strength).architecture)

    lowest = ratio(strongest)
    if lowest > target:
        raise UnreachableTargetError(
            f"a target of {target:.3f} of the {meter.metric} cannot be reached: the smallest model these settings "
            f"allow has {lowest:.3f}. Raise the target, lower round_to, or let more kinds of units go."
        )
    low, high = 0, strongest  # cost(low) > target >= cost(high)
    while high - low > 1:
        middle = (low + high) // 2
        if ratio(middle) > target:
            low = middle
        else:
            high = middle
    return plan_at(high)
