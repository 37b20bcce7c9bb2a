"""NViT: global structural pruning to a cost (arXiv 2110.04869)."""

from .config import NViTConfig
from .method import NViT
from .snapshots import model_at

__all__ = ["NViT", "NViTConfig", "model_at"]
