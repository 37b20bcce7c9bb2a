"""The layers of a model that is a tower by itself."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModelError
from ..families import LayerPaths
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from ..spec.towers import towers, unwrap


def own_layers(model: Any) -> list[tuple[LayerPaths, LayerShape]]:
    """Paths and sizes of every layer.

    Raises:
        UnsupportedModelError: no family is registered for the model, or it is a bigger one with towers in it.
    """
    base = unwrap(model)
    inside = [tower.path for tower in towers(base).values() if tower.path]
    if inside:
        raise UnsupportedModelError(
            f"this is done to a tower by itself, and {type(base).__name__} is a bigger model: give what is in it, "
            f"{' or '.join(f'model.get_submodule({path!r})' for path in inside)}"
        )
    architecture = Architecture.of(base)
    return list(zip(layer_paths(base, architecture), architecture.layers, strict=True))
