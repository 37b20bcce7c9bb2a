"""Groups of units of all sets in one ranking: importance less the cost that a group saves, and which went when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...cost.meter import CostMeter
from ...errors import InvalidConfigError
from ...plan.plan import PruningPlan
from ...plan.select import plan_keeping
from ...spec.architecture import Architecture
from ...spec.layer_shape import LayerShape
from ...spec.units import LAYER_UNITS, UnitSet, check_units, set_name, unit_sets
from .config import GROUP_SIZES, NViTConfig


@dataclass(frozen=True)
class GroupedSet(UnitSet):
    """A set of the unit table, its first unit's place in vectors over all units, and how many go at a time."""

    start: int = 0
    group: int = 1

    @property
    def places(self) -> slice:
        return slice(self.start, self.start + self.size)

    @property
    def groups(self) -> int:
        return self.size // self.group


def grouped_sets(architecture: Architecture, config: NViTConfig) -> tuple[GroupedSet, ...]:
    """All sets of a model: the embedding first, then layer by layer heads, q/k channels, v channels, neurons."""
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
            divisors = ", ".join(str(n) for n in range(1, one.size + 1) if one.size % n == 0)
            raise InvalidConfigError(
                f"groups of {group} do not divide the {one.size} {one.unit} units of {where}: set group_sizes="
                f"{{{one.unit!r}: ...}} to one of {divisors}"
            )
        sets.append(GroupedSet(**vars(one), start=sets[-1].places.stop if sets else 0, group=group))
    if not sets:
        raise InvalidConfigError(f"the model has none of the units {', '.join(wanted)}")
    return tuple(sets)


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


# ---------------------------------------------------------------------- what groups cost
class Sizes:
    """Units left of every set, the model's cost, and what a group of each set would save: kept up to date cheaply."""

    def __init__(
        self, source: Architecture, sets: Sequence[GroupedSet], counts: Sequence[int], meter: CostMeter
    ) -> None:
        self.sets, self.meter, self.counts = sets, meter, list(counts)
        now = resized(source, sets, counts)
        self.shapes, self.width = list(now.layers), now.hidden_size
        self._kinds, self._factors = source.kinds, [source.family.width_factor(stage) for stage in source.stages]
        self._dense = meter.total(source)
        self._costs, self._narrower = [0.0] * len(self.shapes), [0.0] * len(self.shapes)
        self.savings = [0.0] * len(sets)
        self._update(range(len(self.shapes)))

    @property
    def ratio(self) -> float:
        """Cost as a fraction of the unpruned model's."""
        return (sum(self._costs) + self.meter.outer(self.width)) / self._dense

    def removable(self, position: int) -> bool:
        """Whether more than the floor of one group is left."""
        return self.counts[position] > self.sets[position].group

    def remove(self, position: int) -> None:
        """Take a group out of a set."""
        one = self.sets[position]
        self.counts[position] -= one.group
        if one.layer is None:
            self.width = self.counts[position]
            self._update(range(len(self.shapes)))
        else:
            self.shapes[one.layer] = resized_layer(self.shapes[one.layer], one, self.counts[position])
            self._update([one.layer])

    def _update(self, layers: Sequence[int]) -> None:
        """Find the costs of layers anew, and what their groups and one of the embedding (the first set) would save."""
        narrows = self.sets[0].layer is None and self.removable(0)
        narrower = self.width - self.sets[0].group if narrows else self.width
        for i in layers:
            self._costs[i] = self._layer(i, self.shapes[i], self.width)
            self._narrower[i] = self._layer(i, self.shapes[i], narrower) if narrows else self._costs[i]
        changed = set(layers)
        for position, one in enumerate(self.sets):
            if one.layer is None:
                outer = self.meter.outer(self.width) - self.meter.outer(narrower)
                self.savings[position] = (outer + sum(self._costs) - sum(self._narrower)) / self._dense
            elif one.layer in changed:
                left = self.counts[position] - one.group if self.removable(position) else self.counts[position]
                smaller = resized_layer(self.shapes[one.layer], one, left)
                saved = self._costs[one.layer] - self._layer(one.layer, smaller, self.width)
                self.savings[position] = saved / self._dense

    def _layer(self, i: int, shape: LayerShape, width: int) -> float:
        return self.meter.layer(shape, width * self._factors[i], self._kinds[i])


def smallest_ratio(source: Architecture, sets: Sequence[GroupedSet], meter: CostMeter) -> float:
    """Cost with every set at its floor of one group, as a fraction of the unpruned model's."""
    return meter.ratio(resized(source, sets, [one.group for one in sets]))


def fewest_groups(source: Architecture, sets: Sequence[GroupedSet], meter: CostMeter, target: float) -> int:
    """Groups that must go at the least to reach the target: as if each saved what it saves from the whole model."""
    sizes = Sizes(source, sets, [one.size for one in sets], meter)
    savings = sorted(
        (s for one, s in zip(sets, sizes.savings, strict=True) for _ in range(one.groups - 1)), reverse=True
    )
    saved, groups = 0.0, 0
    while groups < len(savings) and saved < 1 - target:
        saved += savings[groups]
        groups += 1
    return groups


# ---------------------------------------------------------------------- in what order they go
@dataclass
class Removal:
    """A group that goes: place of its set, its units as places in vectors over all, and the cost that remains."""

    set: int
    units: torch.Tensor
    ratio: float


def removals(sizes: Sizes, alive: torch.Tensor, scores: torch.Tensor, eta: float) -> Iterator[Removal]:
    """Groups in the order in which they go, until every set is at its floor; ``sizes`` follows.

    Groups are made once: the ``alive`` (units,) of a set, sorted by ``scores`` (units,), cut into chunks. A group's
    importance is the sum of its scores, as a share of the sum over all groups; what it saves, times ``eta``, is found
    anew after every removal. All tensors are on the CPU.
    """
    queues: list[list[torch.Tensor]] = []
    importance: list[list[float]] = []
    for one in sizes.sets:
        places = alive[one.places].nonzero().squeeze(1) + one.start
        order = places[torch.argsort(scores[places], stable=True)]
        chunks = order.view(-1, one.group)
        queues.append(list(chunks))
        importance.append(scores[chunks].double().sum(1).tolist())
    total = sum(map(sum, importance)) or 1.0
    taken = [0] * len(sizes.sets)

    def value(position: int) -> tuple[float, float]:
        share = importance[position][taken[position]] / total
        # equal values, as of units that do nothing: the set with more of itself left goes first
        return share - eta * sizes.savings[position], -sizes.counts[position] / sizes.sets[position].size

    while candidates := [p for p in range(len(sizes.sets)) if sizes.removable(p)]:
        chosen = min(candidates, key=value)
        units = queues[chosen][taken[chosen]]
        taken[chosen] += 1
        sizes.remove(chosen)
        yield Removal(chosen, units, sizes.ratio)


@dataclass(frozen=True)
class Moment:
    """The state after so many groups and optimizer steps; ``ratio``: cost as a fraction of the unpruned model's."""

    groups: int
    step: int
    ratio: float


class Trajectory(nn.Module):
    """When every unit was removed, as buffers: masks, plans and costs of every moment follow from them.

    Attributes:
        order: (units,) 0 for a unit that is there, else the number, from 1, of the removal that took it.
        steps: (groups,) optimizer steps that had been made at every removal.
    """

    order: torch.Tensor
    steps: torch.Tensor

    def __init__(self, sets: Sequence[GroupedSet], device: torch.device) -> None:
        super().__init__()
        self.sets = tuple(sets)
        units, groups = sets[-1].places.stop, sum(one.groups for one in sets)
        self.register_buffer("order", torch.zeros(units, dtype=torch.int32, device=device))
        self.register_buffer("steps", torch.zeros(groups, dtype=torch.int32, device=device))

    @property
    def groups(self) -> int:
        """Groups removed so far."""
        return int(self.order.max())

    def add(self, removals: Iterable[Removal], step: int) -> None:
        """Note removals, in their order, after so many optimizer steps."""
        for number, removal in enumerate(removals, start=self.groups + 1):
            self.order[removal.units.to(self.order.device)] = number
            self.steps[number - 1] = step

    def alive(self, groups: int | None = None) -> torch.Tensor:
        """(units,) booleans on the CPU: what was there after so many removals; by default what is there now."""
        order = self.order.cpu()
        return (order == 0) | (order > (self.groups if groups is None else groups))

    def counts(self, groups: int | None = None) -> list[int]:
        """Units that were there, set by set."""
        alive = self.alive(groups)
        return [int(alive[one.places].sum()) for one in self.sets]

    def moments(self, source: Architecture, meter: CostMeter) -> list[Moment]:
        """Every moment so far, from before the first removal on."""
        sizes = Sizes(source, self.sets, [one.size for one in self.sets], meter)
        order, steps = self.order.cpu(), self.steps.tolist()
        place = torch.zeros(self.groups + 1, dtype=torch.long)
        for position, one in enumerate(self.sets):
            place[order[one.places].long()] = position
        rows = [Moment(0, 0, 1.0)]
        for number in range(1, self.groups + 1):
            sizes.remove(int(place[number]))
            rows.append(Moment(number, steps[number - 1], sizes.ratio))
        return rows
