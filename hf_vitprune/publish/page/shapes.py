"""Sizes of a dense model's layers and of pruned ones, layer beside layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ModelMismatchError
from ...plan.plan import PruningPlan
from ...spec.architecture import Architecture
from ...spec.units import layer_sizes
from ..layers import layer_rows
from .charts import Chart, bar_chart

#: more rows of :func:`layer_rows` that are drawn, where a model has them
MORE = {"conv_channels": "channels of the convolution", "macs": "multiply-adds"}


def places_of(
    dense: Architecture, small: Architecture, remembered: Mapping[str, Any], plan: PruningPlan | None = None
) -> tuple[list[int], bool]:
    """For every layer of a pruned model, which layer of the dense one it was; and whether that is known.

    A plan for the dense model says so, and so does the config of a model that lost layers and nothing else; else the
    first layers of every stage are taken to have stayed.

    Args:
        remembered: ``lineage_of`` the pruned model's config.
        plan: what it was made by.

    Raises:
        ModelMismatchError: it is of another family, or has more layers.
    """
    if small.model_type != dense.model_type or any(
        small.stages.count(stage) > dense.stages.count(stage) for stage in {*small.stages}
    ):
        raise ModelMismatchError(
            f"a {small.model_type} of {len(small.layers)} layers was not made from this {dense.model_type} of "
            f"{len(dense.layers)}: give the dense model first, then what was pruned from it"
        )
    if plan is not None and len(plan.source.layers) == len(dense.layers) and len(plan.layers) == len(small.layers):
        return [entry.index for entry in plan.layers], True
    kept = remembered.get("kept_layers")
    if kept is not None and len(kept) == len(small.layers):
        return list(kept), True
    theirs = [(stage, dense.stages[:i].count(stage)) for i, stage in enumerate(dense.stages)]
    places = [theirs.index((stage, small.stages[:i].count(stage))) for i, stage in enumerate(small.stages)]
    return places, len(places) == len(theirs)


def plan_beside(folder: str) -> PruningPlan | None:
    """The plan that ``hf-vitprune prune`` leaves in the folder of a model; None where there is none."""
    path = Path(folder) / "plan.json"
    return PruningPlan.load(path) if path.is_file() else None


def size_charts(
    architectures: Mapping[str, Architecture], places: Mapping[str, Sequence[int]], image_size: Any = None
) -> list[Chart]:
    """A chart a unit, and one of multiply-adds; the first architecture is the dense one."""
    (_, dense), *models = architectures.items()
    whole = layer_rows(dense, image_size)[:-1]
    rows = {name: layer_rows(small, image_size)[:-1] for name, small in models}
    charts = []
    for key, title in {**layer_sizes(), **MORE}.items():
        full = [_size(row, key, dense, i) for i, row in enumerate(whole)]
        kept = []
        for name, small in models:
            at: list[float | None] = [None] * len(whole)
            for i, place in enumerate(places[name]):
                at[place] = _size(rows[name][i], key, small, i)
            kept.append((name, at))
        optional = key.endswith("_in") or key == "conv_channels"
        if not optional or any(row.get(key) is not None for mine in rows.values() for row in mine):
            charts.append(bar_chart(title, full, kept, dense.stages))
    return charts


def _size(row: Mapping[str, Any], key: str, architecture: Architecture, layer: int) -> float:
    size = row.get(key)
    if size is None:  # of what a branch reads: all there are; of a convolution: there is none
        return architecture.width(layer) if key.endswith("_in") else 0
    return size
