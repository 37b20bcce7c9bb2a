"""Which sizes a latency table is measured at, and times on such a grid: read between its points, never beyond them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.isotonic import isotonic_regression

from ..errors import InvalidConfigError, LatencyTableError
from ..spec.architecture import Architecture
from ..spec.layer_shape import KERNELS

#: sizes along an axis -> how many points, for grids of minutes and of an hour
COARSE = {"embedding": 4, "heads": 3, "qk": 4, "v": 4, "mlp": 6, "inputs": 3, "channels": 2}
FINE = {"embedding": 8, "heads": 6, "qk": 8, "v": 8, "mlp": 12, "inputs": 5, "channels": 4}
NAMED = {"coarse": COARSE, "fine": FINE}
#: whole numbers of these are fast on most devices, and the smallest a search leaves by default
STEPS = {"embedding": 8, "heads": 1, "qk": 8, "v": 8, "mlp": 8, "inputs": 8, "channels": 8}
#: smaller dense sizes are those of toys, which are pruned in smaller steps: measured from 1 on
TOY = {"embedding": 128, "heads": 1, "qk": 32, "v": 32, "mlp": 512, "inputs": 128, "channels": 32}

#: end of the name of a grid whose blocks read only some residual channels
READING = "_reading"
#: grids of a stage -> their axes; windows add ``shifted`` where attention or its place is timed
GRID_AXES: dict[str, tuple[str, ...]] = {
    "none": ("embedding",),
    "attention": ("embedding", "heads", "qk", "v"),
    "attention" + READING: ("embedding", "inputs", "heads", "qk", "v"),
    "mlp": ("embedding", "mlp"),
    "mlp" + READING: ("embedding", "inputs", "mlp"),
    "identity": ("embedding",),
    **dict.fromkeys(KERNELS, ("embedding", "channels", "batch_norm")),
}
#: rounds of the monotone fit over all axes, at most
FITS = 50
#: axes of yes and no
SWITCHES = ("shifted", "batch_norm")

#: what the provenance of a table must say
PROVENANCE = ("device", "device_type", "dtype", "batch_size", "image_size", "torch", "transformers", "date")
#: grids that every stage has; without the others, blocks that read a part of their inputs are not covered
STAGE_GRIDS = ("none", "attention", "mlp")

StageAxes = dict[str, tuple[int, ...]]


def stage_axes(architecture: Architecture, grid: str | Mapping[str, Sequence[int]] = "coarse") -> list[StageAxes]:
    """Axes of every stage: from the smallest size that a search may ask for up to the dense one.

    Args:
        architecture: of the model; its dense form gives the largest sizes.
        grid: ``"coarse"``, ``"fine"``, or sizes by axis (``embedding``, ``heads``, ``qk``, ``v``, ``mlp``,
            ``inputs``, ``channels`` of convolutions) for what is to differ from the coarse grid; sizes over the dense
            one of a stage are left out there, and the dense one is always added.

    Raises:
        InvalidConfigError: an unknown name or axis, or sizes that are no positive whole numbers.
    """
    given: dict[str, tuple[int, ...]] = {}
    if isinstance(grid, Mapping):
        given, grid = {axis: _checked(axis, sizes) for axis, sizes in grid.items()}, "coarse"
    if grid not in NAMED:
        raise InvalidConfigError(f"grid is one of {', '.join(NAMED)}, or sizes by axis; not {grid!r}")
    dense = Architecture.dense(architecture.config, architecture.task)
    stages = []
    for stage in sorted(set(dense.stages)):
        layer = dense.stages.index(stage)
        shape, width = dense.layers[layer], dense.width(layer)
        full = {"embedding": width, "heads": shape.heads, "qk": shape.qk_dim, "v": shape.v_dim}
        full |= {"mlp": shape.mlp, "inputs": width, "channels": shape.v_dim}
        axes = {
            axis: tuple(sorted({*(s for s in given[axis] if s < size), size}))
            if axis in given
            else spread(size, 1 if size < TOY[axis] else STEPS[axis], NAMED[grid][axis])
            for axis, size in full.items()
        }
        if "embedding" not in dense.units:
            axes["embedding"] = (width,)
        stages.append(axes)
    return stages


def _checked(axis: Any, sizes: Any) -> tuple[int, ...]:
    if axis not in STEPS:
        raise InvalidConfigError(f"grid: {axis!r} is no axis; axes are {', '.join(STEPS)}")
    whole = isinstance(sizes, Sequence) and not isinstance(sizes, str) and all(type(s) is int and s > 0 for s in sizes)
    if not whole or not sizes:
        raise InvalidConfigError(f"grid: {axis} is a list of positive whole numbers, not {sizes!r}")
    return tuple(sizes)


def spread(largest: int, step: int, points: int) -> tuple[int, ...]:
    """About ``points`` ascending sizes, multiples of ``step`` up to ``largest``, both ends included."""
    steps = largest // step
    chosen = {step * round(1 + (steps - 1) * i / (points - 1)) for i in range(points - 1)}
    return tuple(sorted({*chosen, largest}))


def grids_of(axes: StageAxes, architecture: Architecture) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name of every grid of a stage -> its axes; see :class:`LatencyTable` for what the grids are."""
    every = {**axes, **dict.fromkeys(SWITCHES, (0, 1))}
    grids = {}
    for name, names in GRID_AXES.items():
        if name in KERNELS and not architecture.family.convolutions:
            continue
        if architecture.depths is not None and name in ("none", "attention", "attention" + READING):
            names = (*names, "shifted")
        grids[name] = {axis: every[axis] for axis in names}
        if name.endswith(READING):  # only methods that keep the residual width read a part of it
            grids[name]["embedding"] = axes["embedding"][-1:]
    return grids


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
        """Inverse of :meth:`to_dict`."""
        try:
            axes = {str(axis): tuple(values) for axis, values in record["axes"].items()}
            seconds = np.array(record["seconds"], dtype=float)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise LatencyTableError(f"{name}: not a grid of times ({error!r})") from error
        return cls(name, axes, seconds)


def check_complete(
    provenance: Mapping[str, Any], covers: Mapping[str, Any], model: SampledGrid, stages: list[dict[str, SampledGrid]]
) -> None:
    """Raises:
    LatencyTableError: parts of a table are missing, or do not belong together; names them.
    """
    missing = [name for name in PROVENANCE if name not in provenance]
    missing += [name for name in ("model_type", "width_factors") if name not in covers]
    missing += [f"{name} of stage {i}" for i, grids in enumerate(stages) for name in STAGE_GRIDS if name not in grids]
    if missing or not stages:
        raise LatencyTableError(f"the table lacks {', '.join(missing or ['stages'])}")
    size, factors = provenance["image_size"], covers["width_factors"]
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise LatencyTableError(f"the table's image_size is {size!r}, not a height and a width")
    if not isinstance(factors, list) or len(factors) != len(stages) or any(type(f) is not int for f in factors):
        raise LatencyTableError(f"the table has {len(stages)} stages with width factors {factors!r}")
    for name, grid in [("model", model)] + [item for row in stages for item in row.items()]:
        if set(grid.axes) - {"shifted"} != set(GRID_AXES.get(name, GRID_AXES["none"])):
            raise LatencyTableError(f"{grid.name}: times by {', '.join(grid.axes)}")
