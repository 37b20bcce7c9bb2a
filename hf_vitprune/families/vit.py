"""ViT: one CLS token, q/k/v/o and fc1/fc2, `head_dim` honoured by the stock config."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Family


@dataclass(frozen=True)
class ViTFamily(Family):
    """ViT and its close relatives: special tokens, a final LayerNorm."""

    config_head_dim: bool = True
    convolutions: bool = True


VIT = ViTFamily(model_type="vit", root="vit")

__all__ = ["VIT", "ViTFamily"]
