"""Which group went when: any moment of a pruning run can be told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...cost.meter import CostMeter
from ...spec.architecture import Architecture
from .ranking import Removal, Sizes
from .units import GroupedSet


@dataclass(frozen=True)
class Moment:
    """The state after a group was removed.

    Attributes:
        groups: removed so far.
        step: optimizer steps made so far.
        ratio: cost of what is left, as a fraction of the unpruned model's.
    """

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
