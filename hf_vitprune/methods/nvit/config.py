"""Settings of NViT, and the schedule that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ...errors import InvalidConfigError
from ...utils.settings import (
    check_count,
    check_counts,
    check_flags,
    check_number,
    check_one_of,
    check_open_interval,
    check_positive,
    choice_of,
)
from ..base import PruningConfig

#: units of a group, as published for DeiT-B
GROUP_SIZES = {"embedding": 16, "heads": 2, "qk": 8, "v": 8, "mlp": 16}
KINDS = tuple(GROUP_SIZES)
CRITERIA = ("squared_taylor", "taylor", "magnitude", "random")
#: published: optimizer steps between prune steps
INTERVAL = 100
#: prune steps that a run has at least, where it has so many optimizer steps
PRUNE_STEPS = 20


@dataclass
class NViTConfig(PruningConfig):
    """Global structural pruning to a cost (Yang et al., arXiv 2110.04869).

    Groups of units of all kinds compete in one ranking: residual channels, heads, q/k channels, v channels, MLP
    neurons. The least important ones are removed a few at a time while the model trains, until ``target`` is reached.

    Attributes:
        criterion: what makes a unit important. ``squared_taylor`` (the paper's): the square of the first-order change
            of the loss on its removal. ``taylor``: its absolute value. ``magnitude``: the norm of its weights,
            relative to the mean of its set. ``random``: baseline, drawn once.
        reference: divisors and moving average as in the published code, for comparisons: the embedding's sum is
            divided by 12 whatever the depth, a head's by 12, and the average starts again from zero after the first
            prune step, without bias correction.
        eta: weight of the cost that a group saves (both as shares of the whole model's) against its importance (as a
            share of all groups'); 0 ranks by importance alone.
        momentum: of the moving average of scores over prune steps (paper: 0.9).
        group_sizes: units a group, by kind: any of ``embedding``, ``heads``, ``qk``, ``v``, ``mlp``; what is left out
            is as published (16, 2, 8, 8, 16). One group of a set always stays.
        units: kinds that are pruned; by default all that the model has.
        interval: optimizer steps between prune steps (paper: 100); None: 100, or a twentieth of the pruning part of
            the training where that is less.
        groups_per_step: groups removed at a prune step (paper: 2, and 1 at the first one); None: as many as it takes
            to reach the target evenly over the pruning part.
        pruning_share: share of the training in which pruning takes place, in (0, 1]; what follows tunes the masked
            model. By default half, or all where ``groups_per_step`` is given.
        snapshots: further targets, above ``target``: the model is saved as it passes each of them.
        snapshot_folder: where to; one model folder a snapshot.
        seed: of the criterion ``random``.
    """

    unused: ClassVar = {"gate_learning_rate": "NViT has no gates that learn"}
    criterion: str = "squared_taylor"
    reference: bool = False
    eta: float = 0.03
    momentum: float = 0.9
    group_sizes: dict[str, int] = field(default_factory=dict)
    units: tuple[str, ...] | None = None
    interval: int | None = None
    groups_per_step: int | None = None
    pruning_share: float | None = None
    snapshots: tuple[float, ...] = ()
    snapshot_folder: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is None:
            raise InvalidConfigError("NViT prunes to a target: give target, the fraction of the cost that may remain")
        check_one_of(self, "criterion", CRITERIA)
        check_flags(self, "reference")
        check_number("eta", self.eta)
        check_number("momentum", self.momentum, highest=1)
        if self.momentum == 1:
            raise InvalidConfigError("momentum must be under 1: at 1 no score would ever count")
        given = self.group_sizes
        if not isinstance(given, dict) or set(given) - set(KINDS):
            raise InvalidConfigError(f"group_sizes is a dict with any of {', '.join(KINDS)}, not {given!r}")
        self.group_sizes = {**GROUP_SIZES, **given}
        for kind, size in self.group_sizes.items():
            check_count(f"group_sizes[{kind!r}]", size)
        if self.units is not None:
            self.units = choice_of(self, "units", KINDS)
        check_counts(self, "interval", "groups_per_step", optional=True)
        if self.pruning_share is not None:
            check_positive("pruning_share", self.pruning_share, highest=1)
        check_count("seed", self.seed, 0)
        self._check_snapshots(self.target)

    @classmethod
    def rounded_to(cls, multiple: int) -> dict[str, Any]:
        return {"group_sizes": {**dict.fromkeys(KINDS, multiple), "heads": 1}}

    def _check_snapshots(self, target: float) -> None:
        if not isinstance(self.snapshots, (list, tuple)):
            raise InvalidConfigError(f"snapshots is a list of targets, not {self.snapshots!r}")
        self.snapshots = tuple(self.snapshots)
        for budget in self.snapshots:
            check_open_interval("a snapshot's target", budget)
            if budget <= target:
                raise InvalidConfigError(
                    f"snapshots are taken on the way to target={target}; {budget} is not above it"
                )
        if len(set(self.snapshots)) < len(self.snapshots):
            raise InvalidConfigError(f"there is a snapshot twice in {self.snapshots}")
        if bool(self.snapshots) != (self.snapshot_folder is not None):
            raise InvalidConfigError("snapshots and snapshot_folder go together: what to save, and where")


@dataclass(frozen=True)
class Schedule:
    """When groups are removed in one run, and how many.

    Attributes:
        interval, count: optimizer steps between prune steps, and how many of these there are.
        groups: removed at each (1 at the first); None: as many as it takes to reach the target at the last.
    """

    interval: int
    count: int
    groups: int | None

    @classmethod
    def of(cls, config: NViTConfig, max_steps: int) -> Schedule:
        """The schedule of a training of ``max_steps`` optimizer steps."""
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
        """Groups removed in all after a prune step, where ``groups`` is given: 1, 2, 4, 6, ... at two a step."""
        assert self.groups is not None
        return prune_step if self.groups == 1 else max(1, self.groups * (prune_step - 1))

    def due(self, prune_step: int, removed: int, missing: int) -> int:
        """Groups to remove at a prune step: so many are removed, so many would have to go for the target now."""
        if self.groups is None:
            return math.ceil(missing / (self.count - prune_step + 1))
        return self.cumulative(prune_step) - removed
