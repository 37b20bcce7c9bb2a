"""Pixio: DINOv2's config and ViT's layers, with several CLS tokens; its backbone has a norm of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from .dinov2 import Dinov2Family


@dataclass(frozen=True)
class PixioFamily(Dinov2Family):
    def extra_tokens_of(self, config: PreTrainedConfig) -> int:
        return config.n_cls_tokens

    def stream_norms(self, model: nn.Module) -> list[str]:
        own = ["layernorm"] if self.encoder_path(model) and hasattr(model, "layernorm") else []
        return super().stream_norms(model) + own


PIXIO = PixioFamily(
    model_type="pixio",
    not_stock=("Backbone",),  # its two norms change places
    root="pixio",
    config_head_dim=True,
    convolutions=True,
    interpolates=False,
    # transformers adds and takes away a base model's prefix, and so loads one of the two norms for the other
    twin_attributes={"PixioBackbone": {"base_model_prefix": ""}},
)
