"""One ranking over the groups of all sets: importance, less the cost that a group saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ...cost.meter import CostMeter
from ...spec.architecture import Architecture
from .units import GroupedSet, resized, resized_layer


@dataclass
class Removal:
    """A group that is removed.

    Attributes:
        set: place of its set among all sets.
        units: (group size,) its units, as places in vectors over all units.
        ratio: cost of the model without it (and without those removed before), as a fraction of the unpruned one's.
    """

    set: int
    units: torch.Tensor
    ratio: float


class Sizes:
    """Units left of every set, the model's cost, and what a group of each set would save: kept up to date cheaply."""

    def __init__(
        self, source: Architecture, sets: Sequence[GroupedSet], counts: Sequence[int], meter: CostMeter
    ) -> None:
        self.sets, self.meter = sets, meter
        self.counts = list(counts)
        now = resized(source, sets, counts)
        self.shapes, self.width, self.kinds = list(now.layers), now.hidden_size, source.kinds
        self._factors = [source.family.width_factor(stage) for stage in source.stages]
        self._dense = meter.total(source)
        self._by_layer: dict[int | None, list[int]] = {}
        for position, one in enumerate(sets):
            self._by_layer.setdefault(one.layer, []).append(position)
        self._layers = [self._layer(i, self.width) for i in range(len(self.shapes))]
        self._narrower = self._all_narrower()
        self.savings = [0.0] * len(sets)
        self._update(range(len(sets)))

    @property
    def ratio(self) -> float:
        """Cost as a fraction of the unpruned model's."""
        return (sum(self._layers) + self.meter.outer(self.width)) / self._dense

    def remove(self, position: int) -> None:
        """Take a group out of a set."""
        one = self.sets[position]
        self.counts[position] -= one.group
        if one.layer is None:
            self.width = self.counts[position]
            self._layers = [self._layer(i, self.width) for i in range(len(self.shapes))]
            self._narrower = self._all_narrower()
            self._update(range(len(self.sets)))
            return
        i = one.layer
        self.shapes[i] = resized_layer(self.shapes[i], one, self.counts[position])
        self._layers[i] = self._layer(i, self.width)
        if self._narrower:
            self._narrower[i] = self._layer(i, self._narrow_width)
        self._update([*self._by_layer[i], *self._by_layer.get(None, [])])

    def removable(self, position: int) -> bool:
        """Whether more than the floor of one group is left."""
        return self.counts[position] > self.sets[position].group

    # ------------------------------------------------------------------ parts
    def _layer(self, i: int, width: int) -> float:
        return self.meter.layer(self.shapes[i], width * self._factors[i], self.kinds[i])

    @property
    def _narrow_width(self) -> int:
        return self.width - self.sets[self._by_layer[None][0]].group

    def _all_narrower(self) -> list[float]:
        """Cost of every layer one embedding group narrower; empty where the embedding is at its floor."""
        if None not in self._by_layer or not self.removable(self._by_layer[None][0]):
            return []
        return [self._layer(i, self._narrow_width) for i in range(len(self.shapes))]

    def _update(self, positions: Sequence[int] | range) -> None:
        for position in positions:
            one = self.sets[position]
            if not self.removable(position):
                self.savings[position] = 0.0
            elif one.layer is None:
                outer = self.meter.outer(self.width) - self.meter.outer(self._narrow_width)
                self.savings[position] = (outer + sum(self._layers) - sum(self._narrower)) / self._dense
            else:
                smaller = resized_layer(self.shapes[one.layer], one, self.counts[position] - one.group)
                width = self.width * self._factors[one.layer]
                cost = self.meter.layer(smaller, width, self.kinds[one.layer])
                self.savings[position] = (self._layers[one.layer] - cost) / self._dense


def removals(sizes: Sizes, alive: torch.Tensor, scores: torch.Tensor, eta: float) -> Iterator[Removal]:
    """Groups in the order in which they go, until every set is at its floor; ``sizes`` follows.

    Groups are made once: the living units of a set, sorted by score, cut into chunks. A group's importance is the sum
    of its scores, as a share of the sum over all groups; what it saves is found anew after every removal.

    Args:
        alive: (units,) booleans, on the CPU.
        scores: (units,) importance, on the CPU.
        eta: weight of the saving.
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
