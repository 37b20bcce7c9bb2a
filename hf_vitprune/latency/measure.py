"""Making a latency table: every block of a grid is built and timed on this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..cost.closed_form import count, layer_parts
from ..errors import InvalidConfigError
from ..families.base import pair
from ..modeling import build
from ..spec.architecture import Architecture
from .blocks import Point, TimedModel, points_of
from .coverage import covered_model
from .grid import StageAxes, grids_of, stage_axes
from .measure_time import environment
from .rounds import timed_rounds
from .sampled_grid import SampledGrid
from .table import LatencyTable

Grid = str | Mapping[str, Sequence[int]]


def measure_table(
    model_or_config: Any,
    batch_size: int = 8,
    image_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    grid: Grid = "coarse",
    rounds: int = 5,
    monotone: bool = True,
    partial: str | Path | None = None,
    progress: bool = True,
    beside: Mapping[str, Any] | None = None,
) -> LatencyTable:
    """See :meth:`LatencyTable.measure`.

    Args:
        beside: further models that take turns with the blocks, by name; ``provenance["beside_seconds"]`` has their
            times. A machine's speed drifts, so that only what was timed in one run can be compared closely.
    """
    for name, value in (("batch_size", batch_size), ("rounds", rounds)):
        if type(value) is not int or value < 1:
            raise InvalidConfigError(f"{name} is a whole number of at least 1, got {value!r}")
    architecture = _architecture_of(model_or_config)
    size = _image_size(architecture, image_size)
    at, kind = _placement(model_or_config, device, dtype)
    stages = stage_axes(architecture, grid)
    points = points_of(stages, architecture)

    timed = TimedModel(architecture, batch_size, size, kind, at)
    started = time.monotonic()
    calls = timed.calls(points)
    dense: Any = build(timed.dense.config, timed.dense)
    models = {"": dense.to(at, kind).eval()}
    models |= {name: model.to(at, kind).eval() for name, model in (beside or {}).items()}
    calls += [functools.partial(model, pixel_values=timed.pixels) for model in models.values()]
    efforts = [_effort(timed.dense, point, size) for point in points]
    efforts += [count(model, size).macs for model in models.values()]
    setting = {"dtype": str(kind).removeprefix("torch."), "batch_size": batch_size, "image_size": list(size)}
    setting = {**environment(at), **setting, "attention": timed.attention, "rounds": rounds}
    covers = covered_model(architecture, size)
    header = {**setting, **covers, "axes": [{k: list(v) for k, v in axes.items()} for axes in stages]}
    header["beside"] = list(models)[1:]
    done = timed_rounds(calls, efforts, rounds, at, header, None if partial is None else Path(partial), progress)
    setting["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    setting["minutes"] = round((time.monotonic() - started) / 60, 1)
    medians = [median(row[i] for row in done) for i in range(len(calls))]
    setting["dense_seconds"], *others = medians[len(points) :]
    if beside:
        setting["beside_seconds"] = dict(zip(beside, others, strict=True))
    return _table(architecture, setting, stages, medians[: len(points)], monotone)


def _architecture_of(model_or_config: Any) -> Architecture:
    if isinstance(model_or_config, Architecture):
        return model_or_config
    if isinstance(model_or_config, PreTrainedConfig):
        return Architecture.from_config(model_or_config)
    return Architecture.of(model_or_config)


def _image_size(architecture: Architecture, image_size: Any) -> tuple[int, int]:
    if image_size is None:
        return pair(architecture.family.sizes_config(architecture.config).image_size)
    sides = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size,) * 2
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise InvalidConfigError(f"image_size is a number of pixels or (height, width), not {image_size!r}")
    return sides[0], sides[1]


def _placement(
    model_or_config: Any, device: str | torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """What is asked for, else the model's, else processor and float32."""
    where, kind = torch.device("cpu"), torch.float32
    if isinstance(model_or_config, torch.nn.Module):
        parameter = next(p for p in model_or_config.parameters() if p.is_floating_point())
        where, kind = parameter.device, parameter.dtype
    return torch.device(device) if device is not None else where, dtype or kind


def _effort(dense: Architecture, point: Point, image_size: tuple[int, int]) -> float:
    """About how long a point takes, in multiply-adds: the model around the blocks is taken for a block."""
    grid = dense.family.grid(dense.config, image_size)
    stage, width = point.stage or 0, point.sizes["embedding"]
    macs = sum(part.macs for part in layer_parts(dense, point.shape(False), width, stage, grid))
    tokens = dense.family.attention_tokens(dense.config, grid, stage)[0]
    return macs + 500 * tokens * width  # norms and residuals have no multiply-adds, but take time


def _table(
    architecture: Architecture,
    setting: dict[str, Any],
    stages: list[StageAxes],
    medians: list[float],
    monotone: bool,
) -> LatencyTable:
    rest = iter(medians)

    def sampled(name: str, axes: Mapping[str, tuple[int, ...]]) -> SampledGrid:
        shape = [len(values) for values in axes.values()]
        times = np.array([next(rest) for _ in range(int(np.prod(shape)))]).reshape(shape)
        return SampledGrid(name, dict(axes), times)

    whole = sampled("model", {"embedding": stages[0]["embedding"]})
    grids = [
        {name: sampled(f"stage {i} {name}", axes) for name, axes in grids_of(row, architecture).items()}
        for i, row in enumerate(stages)
    ]
    return LatencyTable(setting, covered_model(architecture, tuple(setting["image_size"])), whole, grids, monotone)
