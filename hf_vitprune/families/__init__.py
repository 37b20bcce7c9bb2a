"""The kinds of models this library prunes, by ``config.model_type``; see docs/adding_a_family.md for one's own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from .base import Family as Family
from .beit import BEIT, DATA2VEC_VISION
from .clip import CLIP, CLIP_TEXT, CLIP_VISION, SIGLIP2_TEXT, SIGLIP_TEXT
from .dinov2 import DINOV2, DINOV2_WITH_REGISTERS, PIXIO, RADIO, RF_DETR_DINOV2, VITPOSE_BACKBONE
from .dinov3 import DINOV3
from .internvl import INTERNVL_VISION
from .parts import UNITS as UNITS
from .parts import LayerPaths as LayerPaths
from .parts import LayerSizes as LayerSizes
from .siglip import AIMV2_VISION, SIGLIP, SIGLIP2, SIGLIP2_VISION, SIGLIP_VISION
from .swin import SWIN, SWINV2
from .videomae import VIDEOMAE
from .vit import DEIT, IJEPA, VIT, VIT_MAE, VIT_MSN

#: prefix of the ``model_type`` of pruned models
PRUNED_PREFIX = "pruned_"

_SHIPPED = (
    *(VIT, DEIT, SWIN, DINOV2, DINOV2_WITH_REGISTERS, CLIP_VISION, CLIP, SIGLIP_VISION, SIGLIP, SIGLIP2_VISION),
    *(SIGLIP2, VIT_MSN, IJEPA, VIT_MAE, VIDEOMAE, AIMV2_VISION, PIXIO, RADIO, DINOV3, BEIT, DATA2VEC_VISION, SWINV2),
    *(INTERNVL_VISION, VITPOSE_BACKBONE, RF_DETR_DINOV2, CLIP_TEXT, SIGLIP_TEXT, SIGLIP2_TEXT),
)
_FAMILIES: dict[str, Family] = {family.model_type: family for family in _SHIPPED}


def add_family(family: Family) -> None:
    """Make a family known by its ``model_type`` (``hf_vitprune.modeling.register_family`` also makes its classes).

    Raises:
        ValueError: the model type is taken.
    """
    if family.model_type in _FAMILIES:
        raise ValueError(f"a family for model_type {family.model_type!r} is registered already")
    _FAMILIES[family.model_type] = family


def remove_family(family: Family) -> None:
    """Undo :func:`add_family`."""
    del _FAMILIES[family.model_type]


def all_families() -> list[Family]:
    return list(_FAMILIES.values())


def base_model_type(model_type: str) -> str:
    """``vit`` for ``vit`` and for ``pruned_vit``."""
    return model_type.removeprefix(PRUNED_PREFIX)


def find_family(model_or_config: Any) -> Family | None:
    """The family of a transformers model or config, dense or pruned; None where there is none."""
    is_config = isinstance(model_or_config, PreTrainedConfig)
    config = model_or_config if is_config else getattr(model_or_config, "config", None)
    model_type = getattr(config, "model_type", None)
    family = _FAMILIES.get(base_model_type(model_type)) if isinstance(model_type, str) else None
    if family is None or is_config:
        return family
    return None if any(c.__name__ in family.refused_classes for c in type(model_or_config).__mro__) else family


def family_of(model_or_config: Any) -> Family:
    """The family of a transformers model or config, dense or pruned.

    Raises:
        UnsupportedModelError: no family is registered for its ``model_type``, or the class holds more than one
            encoder; the message lists what is supported.
    """
    family = find_family(model_or_config)
    if family is None:
        config = getattr(model_or_config, "config", model_or_config)
        raise UnsupportedModelError(
            f"no family is registered for {type(model_or_config).__name__} (model_type "
            f"{getattr(config, 'model_type', None)!r}); supported: {', '.join(sorted(_FAMILIES))}. Register your own "
            "with hf_vitprune.register_family, or prune a part of the model (hf_vitprune.towers lists them)"
        )
    return family
