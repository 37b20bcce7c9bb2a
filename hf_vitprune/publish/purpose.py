"""What a model is for: the Auto class that loads it, and its task on the Hub."""

from __future__ import annotations

from typing import Any

import transformers

from ..utils.mixing import stock_type

#: Auto class -> task of the Hub (None: none that all of its models share); the first that maps a class is taken
_TASKS = {
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForVideoClassification": "video-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForDepthEstimation": "depth-estimation",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForUniversalSegmentation": "image-segmentation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedImageModeling": None,
    "AutoModelForPreTraining": None,
    "AutoBackbone": "image-feature-extraction",
    "AutoModel": "image-feature-extraction",
}


def auto_class(model: Any) -> str | None:
    """Name of the Auto class that maps the model's very class; None where none does."""
    return _mapping(model, (stock_type(model),))


def pipeline_tag(model: Any) -> str | None:
    """The model's task on the Hub, for a class of a user's that of its stock one; None where there is none for it."""
    name = _mapping(model, type(model).__mro__)
    return "image-feature-extraction" if name is None else _TASKS[name]


def _mapping(model: Any, classes: tuple[type, ...]) -> str | None:
    for name in _TASKS:
        found = getattr(transformers, name)._model_mapping.get(type(model.config), ())
        if not set(found if isinstance(found, tuple) else (found,)).isdisjoint(classes):
            return name
    return None
