"""From a target cost to a plan: the same search for every method that can give plans of any strength."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from transformers.utils import logging

from ..cost.meter import CostMeter
from ..errors import UnreachableTargetError
from ..spec.architecture import Architecture

logger = logging.get_logger(__name__)


class _Plan(Protocol):
    @property
    def architecture(self) -> Architecture: ...


P = TypeVar("P", bound=_Plan)


#: a cost so far under its target, as a share of it, is not what was asked for
FAR_UNDER = 0.1


def say_if_far_under(ratio: float, target: float, metric: str, cure: str) -> None:
    """Warn of a plan that takes much more away than its target asks for.

    Args:
        ratio: its cost, as a fraction of the source's.
        target: that fraction, as it was asked for.
        metric: what cost is.
        cure: how to come closer.
    """
    if ratio < (1 - FAR_UNDER) * target:
        logger.warning(
            f"the plan leaves {ratio:.3f} of the {metric}, far under the target of {target:.3f}: it takes more away "
            f"than was asked for. {cure}"
        )


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
