"""Which sizes a latency table is measured at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidConfigError
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
#: axes of yes and no
SWITCHES = ("shifted", "batch_norm")

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
        if "embedding" not in dense.family.units:
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
    """Name of every grid of a stage -> its axes; see :class:`LatencyTable` for what the grids are.

    Args:
        axes: of the stage, from :func:`stage_axes`.
        architecture: of the model: says whether there are windows, and whether convolutions can mix its tokens.
    """
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
