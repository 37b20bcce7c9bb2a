"""What a latency table is of, and what has to be in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LatencyTableError
from ..families.base import pair
from ..spec.architecture import Architecture
from .grid import GRID_AXES
from .sampled_grid import SampledGrid

#: what the provenance of a table must say
PROVENANCE = ("device", "device_type", "dtype", "batch_size", "image_size", "torch", "transformers", "date")
#: grids that every stage has; without the others, blocks that read a part of their inputs are not covered
STAGE_GRIDS = ("none", "attention", "mlp")


def covered_model(architecture: Architecture, image_size: int | tuple[int, int]) -> dict[str, Any]:
    """The dense model behind an architecture and the input it is timed on, as far as times depend on them."""
    dense = Architecture.dense(architecture.config, architecture.task)
    family, config = dense.family, dense.config
    stages = sorted(set(dense.stages))
    first = [dense.stages.index(stage) for stage in stages]
    grid = family.grid(config, image_size)
    return {
        "model_type": dense.model_type,
        "task": dense.task,
        "hidden_size": dense.hidden_size,
        "depths": [dense.stages.count(stage) for stage in stages],
        "width_factors": [family.width_factor(stage) for stage in stages],
        "heads": [dense.layers[i].heads for i in first],
        "head_dim": [dense.layers[i].qk_dim for i in first],
        "mlp": [dense.layers[i].mlp for i in first],
        "fc1": len(family.fc1_names(config)),
        "tokens": [list(family.attention_tokens(config, grid, stage)) for stage in stages],
        "patch_size": list(pair(family.sizes_config(config).patch_size)),
    }


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
