"""Weighted moments of features and targets, streamed over batches and summed over processes, in double precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..errors import InvalidDataError
from ..utils.processes import distributed, shard


class Statistics(NamedTuple):
    """Moments of features x (n of them) and targets t (m), averaged over the weighted rows.

    ``xx`` (n, n) and ``tx`` (m, n) are covariances, ``tt`` (m,) variances; ``rows`` is how many rows of equal weight
    tell as much.
    """

    rows: float
    x: torch.Tensor
    t: torch.Tensor
    xx: torch.Tensor
    tx: torch.Tensor
    tt: torch.Tensor

    def through(self, matrix: torch.Tensor) -> Statistics:
        """Those of the features ``matrix @ x``."""
        xx, tx = matrix @ self.xx @ matrix.T, self.tx @ matrix.T
        return self._replace(x=matrix @ self.x, xx=xx, tx=tx)

    def take(self, features: torch.Tensor) -> Statistics:
        """Those of some of the features."""
        return self._replace(x=self.x[features], xx=self.xx[features][:, features], tx=self.tx[:, features])


def precise_device(device: torch.device) -> torch.device:
    """Where double precision is to be had: the device itself, but for those that have none."""
    return torch.device("cpu") if device.type == "mps" else device


#: rows and columns of a product at a time: bounds what a batch takes beside the sums
ROWS, COLUMNS = 4096, 384


class Moments:
    """Sums for :class:`Statistics`, added to batch by batch.

    Products of a batch are taken in its own precision (half types in single) and around the first batch's mean, so
    that large means cost no digits; sums are kept in float64. Of the features' products only the lower triangle of
    blocks is computed.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.device = precise_device(device)
        self._shift: tuple[torch.Tensor, torch.Tensor] | None = None
        sizes = (), (), (features,), (targets,), (features, features), (targets, features), (targets,)
        self._sums = [torch.zeros(size, dtype=torch.float64, device=self.device) for size in sizes]

    def add(self, x: torch.Tensor, t: torch.Tensor, weights: torch.Tensor) -> None:
        """``x``: (..., features); ``t``: (..., targets); ``weights``: one for each of these rows, none negative."""
        x, t = x.flatten(0, -2), t.flatten(0, -2)
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        if self._shift is None:
            self._shift = x.mean(0, dtype=kind), t.mean(0, dtype=kind)
        for rows in zip(x.split(ROWS), t.split(ROWS), weights.split(ROWS), strict=True):
            self._add(*(part.to(kind) for part in rows))

    def _add(self, x: torch.Tensor, t: torch.Tensor, weights: torch.Tensor) -> None:
        assert self._shift is not None
        root = weights.sqrt()
        x, t = ((part - shift).mul_(root[:, None]) for part, shift in zip((x, t), self._shift, strict=True))
        parts = weights.sum(), weights.square().sum(), root @ x, root @ t, None, t.T @ x, t.square().sum(0)
        for total, part in zip(self._sums, parts, strict=True):
            if part is not None:
                total += part.to(self.device)
        for at in range(0, x.shape[1], COLUMNS):
            self._sums[4][at:, at : at + COLUMNS] += (x[:, at:].T @ x[:, at : at + COLUMNS]).to(self.device)

    def total(self, centred: bool = True, owner: int | None = None) -> Statistics:
        """The statistics over the batches of all processes. The sums are used up: it can be had once.

        Args:
            centred: False for consumers without a bias: second moments instead of covariances, means of zero.
            owner: the only process that needs them; on the others they are of no use. None: every process.
        """
        count, squares, x, t, xx, tx, tt = self._sums
        self._sums = []
        if self._shift is not None:  # other processes have another first batch: bring the sums to a common origin
            sx, st = (s.to(self.device, torch.float64) for s in self._shift)
            whole = float(count)
            xx.addr_(x, sx).addr_(sx, x).addr_(sx, sx, alpha=whole)
            tx.addr_(t, sx).addr_(st, x).addr_(st, sx, alpha=whole)
            tt += 2 * t * st + whole * st.square()
            x += whole * sx
            t += whole * st
        blocks = [xx[at:, at : at + COLUMNS] for at in range(0, len(x), COLUMNS)]
        _reduce([count, squares, x, t, tx, tt, *blocks], owner)
        for at in range(0, len(x), COLUMNS):
            xx[at : at + COLUMNS, at + COLUMNS :] = xx[at + COLUMNS :, at : at + COLUMNS].T
        sums = x, t, xx, tx, tt
        if owner not in (None, shard()[0]):
            return Statistics(float(count), *sums)
        _average(sums, count)
        rows = float(count) ** 2 / float(squares)
        if not centred:
            return Statistics(rows, torch.zeros_like(x), torch.zeros_like(t), xx, tx, tt)
        xx.addr_(x, x, alpha=-1)
        tx.addr_(t, x, alpha=-1)
        return Statistics(rows, x, t, xx, tx, (tt - t.square()).clamp(min=0))


class HeadMoments:
    """Sums of the products of every head's channels with each other, over batches; products and sums as above."""

    def __init__(self, heads: int, channels: int, device: torch.device) -> None:
        self.device = precise_device(device)
        self._sum = torch.zeros(heads, channels, channels, dtype=torch.float64, device=self.device)
        self._count = torch.zeros((), dtype=torch.float64, device=self.device)

    def add(self, x: torch.Tensor, weights: torch.Tensor) -> None:
        """``x``: (sequences, tokens, heads * channels); ``weights``: (sequences * tokens,), none negative."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.flatten(0, 1).to(kind).unflatten(1, self._sum.shape[:2]).transpose(0, 1)
        self._sum += ((x * weights.to(kind)[:, None]).mT @ x).to(self.device)
        self._count += weights.sum().to(self.device)

    def total(self, owner: int | None = None) -> torch.Tensor:
        """(heads, channels, channels) means over the batches of all processes; had once, as :meth:`Moments.total`."""
        _reduce([self._sum, self._count], owner)
        if owner in (None, shard()[0]):
            _average([self._sum], self._count)
        return self._sum


def _average(sums: Iterable[torch.Tensor], count: torch.Tensor) -> None:
    """Divide by a count, in place; refused where that is none, or the sums are not finite."""
    if not float(count) > 0:
        raise InvalidDataError("there are no calibration images that count")
    for total in sums:
        if not bool(total.div_(count).sum().isfinite()):
            raise InvalidDataError("features of the calibration images are not finite numbers")


def _reduce(totals: list[torch.Tensor], owner: int | None) -> None:
    """Sum over processes, in place and all at once; on the owner alone where there is one."""
    if not distributed():
        return
    together = torch.cat([total.flatten() for total in totals])
    if owner is None:
        torch.distributed.all_reduce(together)
    else:
        torch.distributed.reduce(together, dst=owner)
    for total, part in zip(totals, together.split([total.numel() for total in totals]), strict=True):
        total.copy_(part.view_as(total))
