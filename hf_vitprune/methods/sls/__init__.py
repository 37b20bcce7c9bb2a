"""SLS: straightforward layer-wise pruning, by how well a layer's features separate the classes (arXiv 2407.14330)."""

from .analysis import LayerAnalysis, analyse_layers
from .config import SLSConfig
from .features import extract_features
from .method import SLS
from .selection import LayerSelection, select_layers

__all__ = [
    "SLS",
    "LayerAnalysis",
    "LayerSelection",
    "SLSConfig",
    "analyse_layers",
    "extract_features",
    "select_layers",
]
