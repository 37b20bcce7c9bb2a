"""Pruned<X> classes: stock classes whose layers have the sizes that config.json states."""

from __future__ import annotations

from typing import Any

from . import registry
from .registry import (
    build,
    class_for_task,
    config_for,
    pruned_config_class,
    pruned_model_class,
    register_family,
    stock_model_class,
)

__all__ = [
    "build",
    "class_for_task",
    "config_for",
    "pruned_config_class",
    "pruned_model_class",
    "register_family",
    "stock_model_class",
]


def __getattr__(name: str) -> Any:
    # the generated classes: from hf_vitprune.modeling import PrunedViTForImageClassification
    if name.startswith("Pruned") and hasattr(registry, name):
        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
