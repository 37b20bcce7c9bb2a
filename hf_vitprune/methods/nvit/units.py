"""The prunable sets of a model, side by side in one vector of units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...errors import InvalidConfigError
from ...plan.plan import PruningPlan
from ...plan.select import check_units, plan_keeping
from ...spec.architecture import Architecture
from ...spec.layer_shape import LayerShape
from ...spec.units import LAYER_UNITS, UnitSet, set_name, unit_sets
from .config import GROUP_SIZES, NViTConfig


@dataclass(frozen=True)
class GroupedSet(UnitSet):
    """A set of the unit table: groups are made within it, the ranking is over those of all sets.

    Attributes:
        start: place of its first unit in vectors over all units.
        group: units that are removed at a time.
    """

    start: int = 0
    group: int = 1

    @property
    def places(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def groups(self) -> int:
        return self.size // self.group


def grouped_sets(architecture: Architecture, config: NViTConfig) -> tuple[GroupedSet, ...]:
    """All sets of a model: the embedding first, then layer by layer heads, q/k channels, v channels, neurons.

    Raises:
        InvalidConfigError: a group size does not divide a set.
        UnsupportedUnitError: the family has not got one of ``config.units``.
    """
    wanted = check_units(architecture, config.units)
    found = unit_sets(architecture)
    places = [("embedding", None), *((unit, i) for i in range(len(architecture.layers)) for unit in GROUP_SIZES)]
    sets: list[GroupedSet] = []
    for one in (found[set_name(*place)] for place in places if set_name(*place) in found and place[0] in wanted):
        group = max(1, config.group_sizes[one.unit] // one.channels)
        if one.size % group:
            where = (
                architecture.model_type if one.layer is None else f"layer {one.layer} of the {architecture.model_type}"
            )
            raise InvalidConfigError(
                f"groups of {group} do not divide the {one.size} {one.unit} units of {where}: set group_sizes="
                f"{{{one.unit!r}: ...}} to one of {_divisors(one.size)}"
            )
        sets.append(GroupedSet(**vars(one), start=sets[-1].places.stop if sets else 0, group=group))
    if not sets:
        raise InvalidConfigError(f"the model has none of the units {', '.join(wanted)}")
    return tuple(sets)


def _divisors(size: int) -> str:
    return ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)


def resized(architecture: Architecture, sets: Sequence[GroupedSet], counts: Sequence[int]) -> Architecture:
    """The architecture with so many units of every set."""
    shapes, width = list(architecture.layers), architecture.hidden_size
    for one, count in zip(sets, counts, strict=True):
        if one.layer is None:
            width = count
        else:
            shapes[one.layer] = resized_layer(shapes[one.layer], one, count)
    return replace(architecture, layers=tuple(shapes), hidden_size=width)


def resized_layer(shape: LayerShape, one: GroupedSet, count: int) -> LayerShape:
    """The layer with so many units of a set."""
    changes: dict[str, int] = {LAYER_UNITS[one.unit]: count * one.channels}
    return replace(shape, **changes)  # type: ignore[arg-type]


def plan_of(architecture: Architecture, sets: Sequence[GroupedSet], alive: torch.Tensor) -> PruningPlan:
    """The plan that keeps the units marked in ``alive`` (units,)."""
    kept = {
        one.name: tuple(alive[one.places].nonzero().squeeze(1).tolist()) for one in sets if not alive[one.places].all()
    }
    return PruningPlan(architecture, *plan_keeping(architecture, kept)).validated()
