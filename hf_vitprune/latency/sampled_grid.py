"""Seconds on a rectangular grid of sizes: read between its points by multilinear interpolation, never beyond it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.isotonic import isotonic_regression

from ..errors import LatencyTableError

#: at most so many times over all axes
FITS = 50


@dataclass(frozen=True, eq=False)
class SampledGrid:
    """Times at every combination of a few sizes.

    Multiply-adds of a transformer block are linear in each of its sizes, so that interpolation along one axis at a
    time loses nothing of them; what it approximates is only how efficient the device is at a size.

    Attributes:
        name: what was timed, for error messages.
        axes: name of a size -> its ascending values.
        seconds: times, one dimension an axis.
    """

    name: str
    axes: Mapping[str, tuple[int, ...]]
    seconds: np.ndarray

    def __post_init__(self) -> None:
        for axis, values in self.axes.items():
            whole = all(type(v) is int and v >= 0 for v in values)
            if not values or not whole or any(a >= b for a, b in pairwise(values)):
                raise LatencyTableError(f"{self.name}: the {axis} axis {list(values)!r} is no ascending list of sizes")
        shape = tuple(len(values) for values in self.axes.values())
        if self.seconds.shape != shape:
            raise LatencyTableError(f"{self.name}: times of shape {self.seconds.shape} on a grid of {shape}")
        if not (np.isfinite(self.seconds).all() and (self.seconds > 0).all()):
            raise LatencyTableError(f"{self.name}: every time is a positive, finite number of seconds; some are not")

    def at(self, **sizes: int) -> float:
        """Seconds at one combination of sizes; sizes that are no axis of the grid play no part.

        Raises:
            LatencyTableError: a size lies outside the grid; names it and what is covered.
        """
        cube = self.seconds
        for axis, values in self.axes.items():
            size = sizes[axis]
            if not values[0] <= size <= values[-1]:
                raise LatencyTableError(
                    f"{self.name}: {axis} {size} is not covered, the table spans {values[0]} to {values[-1]}; times "
                    "are not extrapolated, so measure a table whose grid has this size"
                )
            i = bisect_right(values, size) - 1
            if values[i] == size:
                cube = cube[i]
            else:
                share = (size - values[i]) / (values[i + 1] - values[i])
                cube = cube[i] * (1 - share) + cube[i + 1] * share
        return float(cube)

    def monotone(self) -> SampledGrid:
        """The grid with times that never fall when a size grows, close to the measured ones in ratio.

        Isotonic regression of the logarithms along one axis after the other, until every axis is in order; times
        that are in order already stay as they are.
        """
        logs = np.log(self.seconds)
        for _ in range(FITS):
            before = logs
            for i in range(logs.ndim):
                logs = np.apply_along_axis(isotonic_regression, i, logs)
            if np.allclose(logs, before, rtol=0, atol=1e-6):
                break
        for i in range(logs.ndim):  # what is left out of order is under the tolerance, or what FITS rounds left
            logs = np.maximum.accumulate(logs, axis=i)
        return SampledGrid(self.name, self.axes, np.exp(logs))

    # ------------------------------------------------------------------ JSON
    def to_dict(self) -> dict[str, Any]:
        return {"axes": {k: list(v) for k, v in self.axes.items()}, "seconds": self.seconds.tolist()}

    @classmethod
    def from_dict(cls, name: str, record: Any) -> SampledGrid:
        """Inverse of :meth:`to_dict`.

        Raises:
            LatencyTableError: the record is malformed, or a time is impossible.
        """
        try:
            axes = {str(axis): tuple(values) for axis, values in record["axes"].items()}
            seconds = np.array(record["seconds"], dtype=float)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LatencyTableError(f"{name}: not a grid of times ({error!r})") from error
        return cls(name, axes, seconds)
