"""Which units are asked for, how many of a set stay, and the plan that keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import InvalidPlanError, UnsupportedUnitError
from ..spec.architecture import Architecture
from ..spec.units import DEFAULT_UNITS, LAYER_UNITS, channels_per_unit, set_name
from .layer_plan import Indices, LayerPlan


def check_ratio(ratio: Any) -> float:
    """A share of units to remove, in (0, 1).

    Raises:
        InvalidPlanError: it is not.
    """
    return check_share("the ratio of units to remove", ratio)


def check_share(what: str, share: Any) -> float:
    """A number in (0, 1).

    Raises:
        InvalidPlanError: it is not.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise InvalidPlanError(f"{what} must lie strictly between 0 and 1, got {share!r}")
    return float(share)


def check_units(architecture: Architecture, units: Sequence[str] | None) -> tuple[str, ...]:
    """Units that the family has; by default all five sizes.

    Raises:
        UnsupportedUnitError: naming the unit and what the family has.
    """
    known = architecture.units
    if units is None:
        return tuple(u for u in DEFAULT_UNITS if u in known)
    if isinstance(units, str) or not units:
        raise UnsupportedUnitError(f"units is a non-empty list of {', '.join(sorted(known))}, got {units!r}")
    for unit in units:
        if unit not in known:
            why = architecture.family.refused_units(architecture.config).get(unit)
            raise UnsupportedUnitError(
                f"{architecture.model_type} models have no prunable unit {unit!r}{f' ({why})' if why else ''}; "
                f"they have {', '.join(sorted(known))}"
            )
    return tuple(units)


def keep_count(size: int, ratio: float, round_to: int, what: str) -> int:
    """Units that stay of ``size``, rounded to the nearest multiple of ``round_to`` that is not over ``size``.

    Raises:
        InvalidPlanError: nothing would stay.
    """
    kept = round(size * (1 - ratio) / round_to) * round_to
    if kept > size:
        kept = size // round_to * round_to
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
    """``count`` as a multiple of ``step``: at least ``least`` multiples, at most ``size`` (which needs not be one).

    Args:
        up: to the next one above, not to the nearest.
    """
    multiple = -(-count // step) if up else round(count / step)
    return min(max(multiple, least) * step, size)


def plan_keeping(source: Architecture, kept: Mapping[str, Indices]) -> tuple[tuple[LayerPlan, ...], Indices | None]:
    """What a plan for ``source`` is made of that keeps these units; sets that are left out stay whole.

    Args:
        kept: set (see ``spec.units``) -> units that stay, in ascending order.

    Returns:
        Kept layers, and kept residual channels (None: all).
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
