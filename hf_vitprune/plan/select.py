"""Which units stay: of a set, of all sets in one order, down to a target; and the plan that keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from transformers.utils import logging

from ..cost.meter import CostMeter
from ..errors import InvalidPlanError, UnreachableTargetError
from ..spec.architecture import Architecture
from ..spec.units import LAYER_UNITS, channels_per_unit, set_name
from .layer_plan import Indices, LayerPlan


def check_ratio(ratio: Any) -> float:
    return check_share("the ratio of units to remove", ratio)


def check_share(what: str, share: Any) -> float:
    """A number in (0, 1); InvalidPlanError where it is not."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise InvalidPlanError(f"{what} must lie strictly between 0 and 1, got {share!r}")
    return float(share)


def keep_count(size: int, ratio: float, round_to: int, what: str) -> int:
    """Units that stay of ``size``, rounded to the nearest multiple of ``round_to`` that is not over ``size``."""
    kept = min(round(size * (1 - ratio) / round_to), size // round_to) * round_to
    if kept < 1:
        raise InvalidPlanError(
            f"{what}: removing {ratio:.0%} of {size} (rounded to {round_to}) empties the set; "
            "lower the ratio or round_to"
        )
    return kept


def best(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Positions of the ``count`` highest scores, ascending; ties go to the lower position."""
    order = torch.argsort(scores.double(), descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def rounded(count: int, size: int, step: int, least: int = 1, up: bool = False) -> int:
    """The multiple of ``step`` next to ``count`` (``up``: above it): at least ``least`` of them, at most ``size``."""
    multiple = -(-count // step) if up else round(count / step)
    return min(max(multiple, least) * step, size)


def plan_keeping(source: Architecture, kept: Mapping[str, Indices]) -> tuple[tuple[LayerPlan, ...], Indices | None]:
    """Kept layers, and kept residual channels (None: all), of a plan that keeps these units.

    ``kept``: set (see ``spec.units``) -> units that stay, in ascending order; sets that are left out stay whole.
    """
    layers = []
    for i in kept.get("layers", range(len(source.layers))):
        entry = LayerPlan.dense(i, source.layers[i])
        for unit in ("qk", "v"):
            if set_name(unit, i) in kept:
                whole = getattr(source.layers[i], LAYER_UNITS[unit])
                times = channels_per_unit(source, unit)
                shifts = range(0, whole, whole // times)
                entry = entry.keep_channels(unit, [s + u for s in shifts for u in kept[set_name(unit, i)]])
        if set_name("heads", i) in kept:
            entry = entry.keep_heads(kept[set_name("heads", i)])
        layers.append(replace(entry, mlp=kept.get(set_name("mlp", i), entry.mlp)))
    return tuple(layers), kept.get("embedding")


class Ranking:
    """Units of several sets in one order: those with the lowest keys (set -> (units,)) go first."""

    def __init__(self, keys: Mapping[str, torch.Tensor]) -> None:
        self.keys = dict(keys)
        self._ranked = torch.cat(list(self.keys.values())).sort().values

    def __len__(self) -> int:
        return len(self._ranked)

    def kept(self, dropped: int) -> dict[str, torch.Tensor]:
        """Set -> (units,) booleans: what stays when this many units go, over all sets.

        Units that sit exactly on the threshold go evenly over the sets and in them: otherwise equal keys (all of
        them, before a training) would stay or go together.
        """
        if dropped >= len(self):
            return {name: torch.zeros_like(keys, dtype=torch.bool) for name, keys in self.keys.items()}
        threshold = self._ranked[dropped]
        above = {name: keys >= threshold for name, keys in self.keys.items()}
        excess = sum(int(kept.sum()) for kept in above.values()) - (len(self) - dropped)
        tied = {name: (self.keys[name] == threshold).nonzero().squeeze(1) for name in above}
        total = sum(map(len, tied.values()))
        out, seen, gone = {}, 0, 0
        for name, kept in above.items():
            seen += len(tied[name])
            quota = round(excess * seen / total)
            out[name] = kept.clone()
            count = quota - gone
            out[name][tied[name][torch.arange(count) * len(tied[name]) // max(count, 1)]] = False
            gone = quota
        return out


class _Plan(Protocol):
    @property
    def architecture(self) -> Architecture: ...


P = TypeVar("P", bound=_Plan)
logger = logging.get_logger(__name__)
#: a cost so far under its target, as a share of it, is not what was asked for
FAR_UNDER = 0.1


def say_if_far_under(ratio: float, target: float, metric: str, cure: str) -> None:
    """Warn of a plan that takes much more away than asked for: ``ratio`` of the source's cost left, not ``target``."""
    if ratio < (1 - FAR_UNDER) * target:
        logger.warning(
            f"the plan leaves {ratio:.3f} of the {metric}, far under the target of {target:.3f}: it takes more away "
            f"than was asked for. {cure}"
        )


def reach_target(plan_at: Callable[[int], P], strongest: int, target: float, meter: CostMeter) -> P:
    """The weakest plan whose cost is at most ``target`` of the source's; UnreachableTargetError names what can be.

    Args:
        plan_at: plan of strength 0 (nothing removed) .. ``strongest``; cost falls with strength, up to rounding.
        target: fraction of the source's cost that may remain.
        meter: what cost is; its reference is the plans' source.
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
