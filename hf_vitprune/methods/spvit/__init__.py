"""SPViT: self-attention pruned into convolution, in a single path (arXiv 2111.11802)."""

from .config import SPViTConfig
from .method import SPViT
from .tuning import SPViTTuning, SPViTTuningConfig

__all__ = ["SPViT", "SPViTConfig", "SPViTTuning", "SPViTTuningConfig"]
