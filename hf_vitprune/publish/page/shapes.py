"""Sizes of a dense model's layers and of pruned ones, layer beside layer; and cost against error for every budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ...cost import count
from ...errors import ModelMismatchError, UnreachableTargetError
from ...methods import OneShotScores
from ...plan.plan import PruningPlan
from ...spec.architecture import Architecture
from ...spec.units import layer_sizes
from ..block_report import places
from ..report import layer_rows
from .charts import Chart, bar_chart

#: more rows of :func:`layer_rows` that are drawn, where a model has them
MORE = {"conv_channels": "channels of the convolution", "macs": "multiply-adds"}
#: shares of the multiply-adds that budgets are asked for
TARGETS = tuple(round(0.1 + 0.05 * i, 2) for i in range(18))


def places_of(
    dense: Architecture, small: Architecture, remembered: Mapping[str, Any], plan: PruningPlan | None = None
) -> tuple[list[int], bool]:
    """For every layer of a pruned model, which layer of the dense one it was; and whether that is known.

    The plan that it was made by says so, and so does the config (``remembered``) of a model that lost layers and
    nothing else; else the first layers of every stage are taken to have stayed.

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
    theirs = places(dense)
    return [theirs.index(place) for place in places(small)], len(small.layers) == len(theirs)


def plan_beside(folder: str) -> PruningPlan | None:
    """The plan that ``hf-vitprune prune`` leaves in the folder of a model; None where there is none."""
    path = Path(folder) / "plan.json"
    return PruningPlan.load(path) if path.is_file() else None


def size_charts(
    architectures: Mapping[str, Architecture], where: Mapping[str, Sequence[int]], image_size: Any = None
) -> list[Chart]:
    """A chart a unit, and one of multiply-adds; the first architecture is the dense one."""
    sizes = {name: _sizes(architecture, image_size) for name, architecture in architectures.items()}
    dense, *models = architectures
    charts = []
    for key, title in {**layer_sizes(), **MORE}.items():
        optional = key.endswith("_in") or key == "conv_channels"
        if optional and not any(row[key] is not None for name in models for row in sizes[name]):
            continue
        kept = []
        for name in models:
            at: list[float | None] = [None] * len(sizes[dense])
            for i, place in enumerate(where[name]):
                at[place] = _size(sizes[name][i], key)
            kept.append((name, at))
        charts.append(bar_chart(title, [_size(row, key) for row in sizes[dense]], kept, architectures[dense].stages))
    return charts


def _sizes(architecture: Architecture, image_size: Any) -> list[dict[str, Any]]:
    """:func:`layer_rows` of the layers, with their ``width``."""
    rows = layer_rows(architecture, image_size)[:-1]
    return [{**row, "width": architecture.width(i)} for i, row in enumerate(rows)]


def _size(row: Mapping[str, Any], key: str) -> float:
    """None says: of what a branch reads, all there are; of a convolution, that there is none."""
    default = row["width"] if key.endswith("_in") else 0
    return default if row[key] is None else row[key]


# ---------------------------------------------------------------------- budgets
class Budget(NamedTuple):
    """The best plan of a share of the dense multiply-adds, and the error of the output that its scores predict."""

    share: float
    error: float


def budgets_of(scores: OneShotScores, round_to: int = 8) -> list[Budget]:
    """What every budget costs in accuracy, from the smallest that can be reached on; 1.0 is the model as it is.

    Args:
        scores: of the dense model.
        round_to: as in ``OneShotScores.plan``.

    Raises:
        UnreachableTargetError: nothing under 95% can be reached.
    """
    whole = count(scores.architecture).macs
    found: dict[float, float] = {}
    refused: UnreachableTargetError | None = None
    for target in tqdm(TARGETS, "budgets", delay=3, leave=False):
        try:
            plan = scores.plan(target, round_to=round_to)
        except UnreachableTargetError as error:
            refused = error
        else:
            found[count(plan.architecture).macs / whole] = float(plan.info["error"])
    if not found and refused is not None:
        raise refused
    return [Budget(share, error) for share, error in sorted(found.items()) if error > 0]
