"""The pruning methods, by the class of their config. Adding one: a folder here, and one ``register_method`` line."""

from __future__ import annotations

from .base import PruningConfig
from .contract import PruningMethod, Stage, Traits
from .nvit import NViT, NViTConfig
from .oneshot import OneShotScores, OneShotSettings
from .registry import config_class_of, method_for, method_names, register_method
from .sls import SLS, LayerSelection, SLSConfig, select_layers
from .spvit import SPViT, SPViTConfig, SPViTTuning, SPViTTuningConfig
from .truncation import Truncation, TruncationConfig
from .vtp import VTP, VTPConfig

register_method(VTPConfig, VTP)
register_method(NViTConfig, NViT)
register_method(SPViTConfig, SPViT)
register_method(SLSConfig, SLS)
register_method(SPViTTuningConfig, SPViTTuning)
register_method(TruncationConfig, Truncation)

__all__ = [
    "SLS",
    "VTP",
    "LayerSelection",
    "NViT",
    "NViTConfig",
    "OneShotScores",
    "OneShotSettings",
    "PruningConfig",
    "PruningMethod",
    "SLSConfig",
    "SPViT",
    "SPViTConfig",
    "SPViTTuning",
    "SPViTTuningConfig",
    "Stage",
    "Traits",
    "Truncation",
    "TruncationConfig",
    "VTPConfig",
    "config_class_of",
    "method_for",
    "method_names",
    "register_method",
    "select_layers",
]
