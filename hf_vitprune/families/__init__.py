"""The kinds of models this library prunes, by ``config.model_type``; see docs/adding_a_family.md for one's own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UnsupportedModelError
from .base import UNITS, Family, LayerPaths, LayerSizes, Part
from .clip import CLIP, CLIP_VISION
from .deit import DEIT
from .dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from .siglip import SIGLIP, SIGLIP_VISION
from .swin import SWIN
from .vit import VIT

#: prefix of the ``model_type`` of pruned models
PRUNED_PREFIX = "pruned_"

_FAMILIES: dict[str, Family] = {}


def add_family(family: Family) -> None:
    """Make a family known by its ``model_type`` (``hf_vitprune.modeling.register_family`` also makes its classes).

    Raises:
        ValueError: the model type is taken.
    """
    if family.model_type in _FAMILIES:
        raise ValueError(f"a family for model_type {family.model_type!r} is registered already")
    _FAMILIES[family.model_type] = family


def all_families() -> list[Family]:
    return list(_FAMILIES.values())


def base_model_type(model_type: str) -> str:
    """``vit`` for ``vit`` and for ``pruned_vit``."""
    return model_type.removeprefix(PRUNED_PREFIX)


def family_of(model_or_config: Any) -> Family:
    """The family of a transformers model or config, dense or pruned.

    Raises:
        UnsupportedModelError: no family is registered for its ``model_type``, or the class holds more than the
            vision encoder; the message lists what is supported.
    """
    config = (
        model_or_config if isinstance(model_or_config, PreTrainedConfig) else getattr(model_or_config, "config", None)
    )
    model_type = getattr(config, "model_type", None)
    family = _FAMILIES.get(base_model_type(model_type)) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"no family is registered for {type(model_or_config).__name__} (model_type {model_type!r}); supported: "
            f"{', '.join(sorted(_FAMILIES))}. Register your own with hf_vitprune.modeling.register_family."
        )
    if isinstance(model_or_config, PreTrainedModel) and type(model_or_config).__name__ in family.refused_classes:
        raise UnsupportedModelError(
            f"{type(model_or_config).__name__} holds a text tower too; prune its `.{family.root}` on its own, or a "
            "vision-only task class"
        )
    return family


for _family in (VIT, DEIT, SWIN, DINOV2, DINOV2_WITH_REGISTERS, CLIP_VISION, CLIP, SIGLIP_VISION, SIGLIP):
    add_family(_family)

__all__ = [
    "PRUNED_PREFIX",
    "UNITS",
    "Family",
    "LayerPaths",
    "LayerSizes",
    "Part",
    "add_family",
    "all_families",
    "base_model_type",
    "family_of",
]
