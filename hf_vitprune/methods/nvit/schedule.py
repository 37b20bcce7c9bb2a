"""When groups are removed, and how many."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import InvalidConfigError
from .config import NViTConfig

#: published: optimizer steps between prune steps
INTERVAL = 100
#: prune steps that a run has at least, where it has so many optimizer steps
PRUNE_STEPS = 20


@dataclass(frozen=True)
class Schedule:
    """Prune steps of one run.

    Attributes:
        interval: optimizer steps between them.
        count: how many there are.
        groups: removed at each (1 at the first); None: as many as it takes to reach the target at the last.
    """

    interval: int
    count: int
    groups: int | None

    @classmethod
    def of(cls, config: NViTConfig, max_steps: int) -> Schedule:
        """The schedule of a training of ``max_steps`` optimizer steps.

        Raises:
            InvalidConfigError: it has no prune step.
        """
        share = config.pruning_share or (0.5 if config.groups_per_step is None else 1.0)
        steps = max(1, math.floor(max_steps * share))
        interval = config.interval or max(1, min(INTERVAL, steps // PRUNE_STEPS))
        if interval > steps:
            raise InvalidConfigError(
                f"interval={interval} leaves no prune step: pruning takes place in the first {steps} of {max_steps} "
                f"steps (pruning_share={share:g}). Train longer, or lower interval"
            )
        return cls(interval, steps // interval, config.groups_per_step)

    def prune_step(self, step: int) -> int:
        """Number, from 1, of the prune step that follows this optimizer step; 0 for none."""
        number, rest = divmod(step, self.interval)
        return number if rest == 0 and number <= self.count else 0

    def cumulative(self, prune_step: int) -> int:
        """Groups removed in all after a prune step: 1, 2, 4, 6, ... at two a step.

        Only where ``groups`` is given.
        """
        assert self.groups is not None
        return prune_step if self.groups == 1 else max(1, self.groups * (prune_step - 1))

    def due(self, prune_step: int, removed: int, missing: int) -> int:
        """Groups to remove at a prune step.

        Args:
            removed: so far.
            missing: groups that would have to go for the target, as things are now.
        """
        if self.groups is None:
            return math.ceil(missing / (self.count - prune_step + 1))
        return self.cumulative(prune_step) - removed
