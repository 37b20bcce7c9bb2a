"""Weighted moments of features and targets, streamed over batches and summed over processes, in double precision."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import InvalidDataError
from ..processes import distributed


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


class Moments:
    """Sums for :class:`Statistics`, added to batch by batch.

    Products of a batch are taken in its own precision (half types in single) and around the first batch's mean, so
    that large means cost no digits; sums are kept in float64.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.device = precise_device(device)
        self._shift: tuple[torch.Tensor, torch.Tensor] | None = None
        sizes = (), (), (features,), (targets,), (features, features), (targets, features), (targets,)
        self._sums = [torch.zeros(size, dtype=torch.float64, device=self.device) for size in sizes]

    def add(self, x: torch.Tensor, t: torch.Tensor, weights: torch.Tensor) -> None:
        """``x``: (rows, features); ``t``: (rows, targets); ``weights``: (rows,)."""
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, t, w = x.to(kind), t.to(kind), weights.to(kind)[:, None]
        if self._shift is None:
            self._shift = x.mean(0), t.mean(0)
        x, t = x - self._shift[0], t - self._shift[1]
        wx = x * w
        parts = w.sum(), w.square().sum(), wx.sum(0), (t * w).sum(0), x.T @ wx, t.T @ wx, (t.square() * w).sum(0)
        for total, part in zip(self._sums, parts, strict=True):
            total += part.to(self.device)

    def total(self, centred: bool = True) -> Statistics:
        """The statistics over the batches of all processes.

        Args:
            centred: False for consumers without a bias: second moments instead of covariances, means of zero.

        Raises:
            InvalidDataError: the features are not finite, or there are none.
        """
        count, squares, x, t, xx, tx, tt = self._sums
        if self._shift is not None:  # other processes have another first batch: bring the sums to a common origin
            sx, st = (s.to(self.device, torch.float64) for s in self._shift)
            xx += torch.outer(x, sx) + torch.outer(sx, x) + count * torch.outer(sx, sx)
            tx += torch.outer(t, sx) + torch.outer(st, x) + count * torch.outer(st, sx)
            tt += 2 * t * st + count * st.square()
            x += count * sx
            t += count * st
            self._shift = None
        if distributed():
            for total in self._sums:
                torch.distributed.all_reduce(total)
        n = float(count)
        if n <= 0:
            raise InvalidDataError("there are no calibration images that count")
        rows = n**2 / float(squares)
        x, t, xx, tx, tt = x / n, t / n, xx / n, tx / n, tt / n
        if not all(bool(part.isfinite().all()) for part in (xx, tx, tt)):
            raise InvalidDataError("features of the calibration images are not finite numbers")
        if not centred:
            return Statistics(rows, torch.zeros_like(x), torch.zeros_like(t), xx, tx, tt)
        xx -= torch.outer(x, x)
        tx -= torch.outer(t, x)
        return Statistics(rows, x, t, (xx + xx.T) / 2, tx, (tt - t.square()).clamp(min=0))
