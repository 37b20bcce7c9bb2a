"""The kinds of models this library prunes, by ``config.model_type``; see docs/adding_a_family.md for one's own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from .aimv2 import AIMV2_VISION
from .base import UNITS, Family, LayerPaths, LayerSizes
from .beit import BEIT
from .clip import CLIP, CLIP_VISION
from .data2vec import DATA2VEC_VISION
from .deit import DEIT
from .dinov2 import DINOV2, DINOV2_WITH_REGISTERS
from .dinov3 import DINOV3
from .ijepa import IJEPA
from .internvl import INTERNVL_VISION
from .pixio import PIXIO
from .radio import RADIO
from .rf_detr import RF_DETR_DINOV2
from .siglip import SIGLIP, SIGLIP_VISION
from .siglip2 import SIGLIP2, SIGLIP2_VISION
from .swin import SWIN
from .swinv2 import SWINV2
from .text import CLIP_TEXT, SIGLIP2_TEXT, SIGLIP_TEXT
from .videomae import VIDEOMAE
from .vit import VIT
from .vit_mae import VIT_MAE
from .vit_msn import VIT_MSN
from .vitpose import VITPOSE_BACKBONE

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
    config = (
        model_or_config if isinstance(model_or_config, PreTrainedConfig) else getattr(model_or_config, "config", None)
    )
    model_type = getattr(config, "model_type", None)
    family = _FAMILIES.get(base_model_type(model_type)) if isinstance(model_type, str) else None
    refused = (
        family is not None
        and not isinstance(model_or_config, PreTrainedConfig)
        and any(c.__name__ in family.refused_classes for c in type(model_or_config).__mro__)
    )
    return None if refused else family


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


_SHIPPED = (
    VIT,
    DEIT,
    SWIN,
    DINOV2,
    DINOV2_WITH_REGISTERS,
    CLIP_VISION,
    CLIP,
    SIGLIP_VISION,
    SIGLIP,
    SIGLIP2_VISION,
    SIGLIP2,
    VIT_MSN,
    IJEPA,
    VIT_MAE,
    VIDEOMAE,
    AIMV2_VISION,
    PIXIO,
    RADIO,
    DINOV3,
    BEIT,
    DATA2VEC_VISION,
    SWINV2,
    INTERNVL_VISION,
    VITPOSE_BACKBONE,
    RF_DETR_DINOV2,
    CLIP_TEXT,
    SIGLIP_TEXT,
    SIGLIP2_TEXT,
)
for _family in _SHIPPED:
    add_family(_family)

__all__ = [
    "PRUNED_PREFIX",
    "UNITS",
    "Family",
    "LayerPaths",
    "LayerSizes",
    "add_family",
    "all_families",
    "base_model_type",
    "family_of",
    "find_family",
    "remove_family",
]
