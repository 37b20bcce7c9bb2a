"""Fits of single Linears: what one reads (a fold of its inputs) and what one writes (a refit of its weights)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..utils.processes import joined, part_of, sum_over_processes
from .algebra import ridge_solve, value_map
from .moments import Statistics

#: LayerScale factors below this share of the largest are left alone: their rows would be divided by almost nothing
SMALLEST_SCALE = 1e-6
#: rows for each feature from which on the ridge is the one that was asked for
ROWS_A_FEATURE = 20


class Fit(NamedTuple):
    """New weights of a Linear, and its relative error (root of lost over total variance) before and after.

    ``starved``: there were fewer rows than features.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    before: float
    after: float
    ridge: float
    starved: bool


class Projection(NamedTuple):
    """Weight (heads, channels, inputs) and bias (heads, channels) of a Linear, head by head."""

    weight: torch.Tensor
    bias: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor, channels: int) -> Projection:
        return cls(weight.unflatten(0, (-1, channels)), bias.unflatten(0, (-1, channels)))

    def through(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the Linear behind which ``maps`` (heads, kept channels, channels) follow."""
        return (maps @ self.weight).flatten(0, 1), (maps @ self.bias[..., None]).flatten()


class Branch(NamedTuple):
    """The end of a branch: what its last Linear reads, and how that goes on into the residual stream.

    Attributes:
        stats: moments of its inputs (n), in double precision, with what it should add to the stream as targets (m).
        weight: (m, n) of the Linear.
        scale: (m,) LayerScale behind it; None without.
        together: every process has these same statistics, and does a part of what is to be solved.
    """

    stats: Statistics
    weight: torch.Tensor
    scale: torch.Tensor | None
    together: bool = False

    @classmethod
    def itself(cls, stats: Statistics, weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor | None) -> Branch:
        """That adds what the Linear makes of its inputs, whose statistics are enough then."""
        branch = cls(stats, weight, scale)
        tx = branch.effect @ stats.xx
        t = branch.effect @ stats.x + (bias if scale is None else scale * bias)
        return branch._replace(stats=stats._replace(t=t, tx=tx, tt=(tx * branch.effect).sum(1)))

    @property
    def effect(self) -> torch.Tensor:
        """(m, n) what the inputs add to the residual stream."""
        return self.weight if self.scale is None else self.scale[:, None] * self.weight

    def take(self, features: torch.Tensor) -> Branch:
        """That reads some of the inputs only."""
        return self._replace(stats=self.stats.take(features), weight=self.weight[:, features])

    def refit(self, ridge: float) -> Fit:
        """Weights that bring the branch closest to its targets; those that it has are the start, and shrunk to."""
        stats, mine = self.stats, _mine(len(self.weight), self.together)
        scale = torch.ones_like(stats.t) if self.scale is None else self.scale.to(stats.t)
        usable = (scale.abs() > SMALLEST_SCALE * scale.abs().max())[mine, None]
        factors, weight = scale[mine, None], self.weight[mine]
        t, tx, tt = stats.t[mine], stats.tx[mine], stats.tt[mine]
        prior = factors * weight
        missing = tx - prior @ stats.xx
        damped = damping(stats, ridge)
        step, left = ridge_solve(stats.xx, missing, damped)
        found = prior + step
        bias = (t - found @ stats.x)[:, None]
        divisor = torch.where(usable, factors, 1.0)
        new = torch.where(usable, found / divisor, weight), torch.where(usable, bias / divisor, 0.0)
        # squared errors of the start and of what was found, where ``left`` is ``tx - found @ stats.xx``
        lost = (tt - (w * (tx + rest)).sum(1) for w, rest in ((prior, missing), (found, left)))
        rows = torch.cat([*new, *(one[:, None] for one in lost)], 1)
        rows = joined(rows, len(stats.tt)) if self.together else rows
        total = stats.tt.sum().clamp(min=torch.finfo(rows.dtype).tiny)
        before, after = (float((one.sum().clamp(min=0) / total).sqrt()) for one in rows[:, -2:].unbind(1))
        starved = stats.rows < len(stats.xx)
        return Fit(rows[:, :-3].clone(), rows[:, -3].clone(), before, after, damped, starved)

    def low_rank(self, size: int, ranks: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every head, the channels of its context that serve its output best, and what the Linear makes of them.

        Args:
            size: channels of a head.
            ranks: for every head the places, among those of all heads, that its channels take.

        Returns:
            (places, n) map of the contexts to uncorrelated channels of variance one, and (m, places) what each of
            these is worth alone.
        """
        places = 1 + max((place for row in ranks for place in row), default=-1)
        down = self.weight.new_zeros(places, len(self.stats.xx))
        start = self.weight.new_zeros(len(self.weight), places)
        effect = self.effect
        for head in part_of(len(ranks)) if self.together else range(len(ranks)):
            row = ranks[head]
            at = slice(head * size, (head + 1) * size)
            found = value_map(self.stats.xx[at, at], effect[:, at], len(row)) if row else down[:0, at]
            filled = list(row)[: len(found)]  # fewer where the residual stream is narrower than the head
            down[filled, at] = found
            start[:, filled] = self.weight[:, at] @ self.stats.xx[at, at] @ found.T
        return (sum_over_processes(down), sum_over_processes(start)) if self.together else (down, start)


def damping(stats: Statistics, ridge: float) -> float:
    """The ridge for these statistics: the fewer rows there are for each feature, the larger."""
    return ridge * max(1.0, ROWS_A_FEATURE * len(stats.xx) / stats.rows)


def fold(
    stats: Statistics, prior: torch.Tensor, ridge: float, together: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Map (m, n) and constant (m,) from the features that stay to all that there were.

    Args:
        stats: of kept features (n) and, as targets, of all (m).
        prior: (m, n) what is used without a fold; the fit shrinks towards it.
        together: as of :class:`Branch`.
    """
    mine = _mine(len(prior), together)
    start = prior[mine]
    found = start + ridge_solve(stats.xx, stats.tx[mine] - start @ stats.xx, damping(stats, ridge))[0]
    found = joined(found, len(prior)) if together else found
    return found, stats.t - found @ stats.x


def _mine(count: int, together: bool) -> slice:
    """Of the targets those that this process solves for: one Cholesky factor serves all of them, one by one."""
    mine = part_of(count) if together else range(count)
    return slice(mine.start, mine.stop)
