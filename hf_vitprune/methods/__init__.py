"""The pruning methods, by the class of their config. Adding one: a folder here, and one ``register_method`` line."""

from __future__ import annotations

from ..errors import InvalidConfigError
from .base import PruningConfig, PruningMethod
from .nvit import NViT, NViTConfig
from .oneshot import OneShotScores, OneShotSettings
from .sls import SLS, LayerSelection, SLSConfig, select_layers
from .spvit import SPViT, SPViTConfig, SPViTTuning, SPViTTuningConfig
from .truncation import Truncation, TruncationConfig
from .vtp import VTP, VTPConfig

_METHODS: dict[type[PruningConfig], type[PruningMethod]] = {}


def register_method(config_class: type[PruningConfig], method_class: type[PruningMethod]) -> None:
    """Make ``get_pruning_model(model, config_class(...))`` use ``method_class``."""
    _METHODS[config_class] = method_class


def method_for(config: PruningConfig) -> type[PruningMethod]:
    """The method that a config belongs to.

    Raises:
        InvalidConfigError: it is no config of a registered method.
    """
    if type(config) not in _METHODS:
        known = ", ".join(sorted(c.__name__ for c in _METHODS))
        raise InvalidConfigError(f"{type(config).__name__} is no pruning config; known: {known}")
    return _METHODS[type(config)]


register_method(NViTConfig, NViT)
register_method(VTPConfig, VTP)
register_method(SLSConfig, SLS)
register_method(SPViTConfig, SPViT)
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
    "Truncation",
    "TruncationConfig",
    "VTPConfig",
    "method_for",
    "register_method",
    "select_layers",
]
