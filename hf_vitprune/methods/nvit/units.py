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
from ...spec.units import LAYER_UNITS, channels_per_unit, has_embedding_set, set_name
from .config import NViTConfig


@dataclass(frozen=True)
class UnitSet:
    """Units that are alike and interchangeable: groups are made within a set, the ranking is over all of them.

    Attributes:
        kind: ``embedding``, ``heads``, ``qk``, ``v`` or ``mlp``.
        layer: the layer it belongs to; None for the embedding.
        start: place of its first unit in vectors over all units.
        size: number of units.
        group: units that are removed at a time.
        channels: of a head that a q/k unit is: two where rotary positions turn pairs of them.
    """

    kind: str
    layer: int | None
    start: int
    size: int
    group: int
    channels: int = 1

    @property
    def name(self) -> str:
        """Of the set in ``spec.units``."""
        return set_name(self.kind, self.layer)

    @property
    def places(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def groups(self) -> int:
        return self.size // self.group


def unit_sets(architecture: Architecture, config: NViTConfig) -> tuple[UnitSet, ...]:
    """All sets of a model: the embedding first, then layer by layer heads, q/k channels, v channels, neurons.

    A model whose parts read some residual channels only (pruned that way before) has no embedding set.

    Raises:
        InvalidConfigError: a group size does not divide a set.
        UnsupportedUnitError: the family has not got one of ``config.units``.
    """
    wanted = check_units(architecture, config.units)
    sets: list[UnitSet] = []

    def add(kind: str, layer: int | None, size: int) -> None:
        if kind not in wanted or not size:
            return
        channels = channels_per_unit(architecture, kind)
        size, group = size // channels, max(1, config.group_sizes[kind] // channels)
        if size % group:
            where = architecture.model_type if layer is None else f"layer {layer} of the {architecture.model_type}"
            raise InvalidConfigError(
                f"groups of {group} do not divide the {size} {kind} units of {where}: set group_sizes="
                f"{{{kind!r}: ...}} to one of {_divisors(size)}"
            )
        sets.append(UnitSet(kind, layer, sets[-1].places.stop if sets else 0, size, group, channels))

    if has_embedding_set(architecture):
        add("embedding", None, architecture.hidden_size)
    for i, shape in enumerate(architecture.layers):
        for kind in ("heads", "qk", "v", "mlp"):
            add(kind, i, getattr(shape, LAYER_UNITS[kind]))
    if not sets:
        raise InvalidConfigError(f"the model has none of the units {', '.join(wanted)}")
    return tuple(sets)


def _divisors(size: int) -> str:
    return ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)


def resized(architecture: Architecture, sets: Sequence[UnitSet], counts: Sequence[int]) -> Architecture:
    """The architecture with so many units of every set."""
    shapes, width = list(architecture.layers), architecture.hidden_size
    for one, count in zip(sets, counts, strict=True):
        if one.layer is None:
            width = count
        else:
            shapes[one.layer] = resized_layer(shapes[one.layer], one, count)
    return replace(architecture, layers=tuple(shapes), hidden_size=width)


def resized_layer(shape: LayerShape, one: UnitSet, count: int) -> LayerShape:
    """The layer with so many units of a set."""
    changes: dict[str, int] = {LAYER_UNITS[one.kind]: count * one.channels}
    return replace(shape, **changes)  # type: ignore[arg-type]


def plan_of(architecture: Architecture, sets: Sequence[UnitSet], alive: torch.Tensor) -> PruningPlan:
    """The plan that keeps the units marked in ``alive`` (units,)."""
    kept = {
        one.name: tuple(alive[one.places].nonzero().squeeze(1).tolist()) for one in sets if not alive[one.places].all()
    }
    return PruningPlan(architecture, *plan_keeping(architecture, kept)).validated()
