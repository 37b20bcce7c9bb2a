"""Latency tables without measuring: times by formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import numpy as np

from hf_vitprune.latency.blocks import covered_model
from hf_vitprune.latency.grid import SampledGrid, StageAxes, grids_of, stage_axes
from hf_vitprune.latency.measure import device_name
from hf_vitprune.latency.table import LatencyTable
from hf_vitprune.spec.architecture import Architecture

Seconds = Callable[..., float]

#: a time for every part, exact under multilinear interpolation
LINEAR: dict[str, Seconds] = {
    "none": lambda embedding, shifted=0: 1e-4 + 1e-6 * embedding + 1e-5 * shifted,
    "attention": lambda embedding, heads, qk, v, inputs=None, shifted=0: (
        2e-4 + 1e-6 * (inputs or embedding) * heads * (2 * qk + v) + 1e-6 * embedding * heads * v + 2e-5 * shifted
    ),
    "mlp": lambda embedding, mlp, inputs=None: 2e-4 + 1e-6 * mlp * (embedding + (inputs or embedding)),
    "identity": lambda embedding: 2e-4 + 1e-6 * embedding,
    "conv3x3": lambda embedding, channels, batch_norm: 2e-4 + 1e-5 * embedding * channels + 1e-5 * batch_norm,
    "conv1x1": lambda embedding, channels, batch_norm: 2e-4 + 2e-6 * embedding * channels + 1e-5 * batch_norm,
    "model": lambda embedding: 1e-3 + 1e-5 * embedding,
}


def provenance(**changes: Any) -> dict[str, Any]:
    record = {"device": device_name(), "device_type": "cpu", "dtype": "float32", "batch_size": 8}
    record |= {"image_size": [16, 16], "threads": 1, "torch": "0", "transformers": "0", "date": "2020-01-01"}
    return {**record, **changes}


def sampled(name: str, seconds: Seconds, axes: Mapping[str, tuple[int, ...]]) -> SampledGrid:
    times = [seconds(**dict(zip(axes, point, strict=True))) for point in product(*axes.values())]
    return SampledGrid(name, dict(axes), np.array(times).reshape([len(v) for v in axes.values()]))


def made_table(
    model: Any, grid: Any = "coarse", parts: Mapping[str, Seconds] = LINEAR, monotone: bool = False, **changes: Any
) -> LatencyTable:
    """The table of a model (or architecture) whose parts take what ``parts`` say; ``changes`` go to its provenance."""
    architecture = model if isinstance(model, Architecture) else Architecture.of(model)
    stages = [_stage(axes, parts, architecture) for axes in stage_axes(architecture, grid)]
    record = provenance(**changes)
    whole = sampled("model", parts["model"], {"embedding": stages[0]["none"].axes["embedding"]})
    return LatencyTable(record, covered_model(architecture, tuple(record["image_size"])), whole, stages, monotone)


def _stage(axes: StageAxes, parts: Mapping[str, Seconds], architecture: Architecture) -> dict[str, SampledGrid]:
    grids = grids_of(axes, architecture)
    return {name: sampled(name, parts[name.removesuffix("_reading")], sizes) for name, sizes in grids.items()}
