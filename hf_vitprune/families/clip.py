"""CLIP's vision tower: alone, with its projection, or under the image classifier of the two-tower config."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from .base import Family


@dataclass(frozen=True)
class ClipFamily(Family):
    def resize_config(
        self, config: PreTrainedConfig, hidden_size: int, num_layers: int, depths: tuple[int, ...] | None
    ) -> None:
        super().resize_config(config, hidden_size, num_layers, depths)
        # the stock config refuses a width that its heads do not divide; the layers' own heads are in the record
        c = self.sizes_config(config)
        c.num_attention_heads = math.gcd(hidden_size, c.num_attention_heads)

    def head_norm(self, task: str) -> str | None:
        return (
            None if task == "ForImageClassification" else super().head_norm(task)
        )  # patches are averaged as they are


CLIP_VISION = ClipFamily(
    model_type="clip_vision_model",
    root="vision_model",
    layers="encoder.layers",
    patch="embeddings.patch_embedding",
    norm1="layer_norm1",
    norm2="layer_norm2",
    attention="self_attn",
    o="out_proj",
    norms=("pre_layrnorm", "post_layernorm"),
    convolutions=True,
)
#: the same tower under ``CLIPConfig``, as AutoModelForImageClassification maps it
CLIP = replace(CLIP_VISION, model_type="clip", sub_config="vision_config", refused_classes=("CLIPModel",))
