"""SLS: straightforward layer-wise pruning, by how well a layer's features separate the classes (arXiv 2407.14330)."""

from .analysis import LayerAnalysis, analyse_layers
from .config import SLSConfig
from .features import extract_features
from .selection import SLS, LayerSelection, select_layers

__all__ = [
    "SLS",
    "LayerAnalysis",
    "LayerSelection",
    "SLSConfig",
    "analyse_layers",
    "extract_features",
    "select_layers",
]
