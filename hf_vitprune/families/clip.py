"""CLIP's vision tower (alone, with its projection, or under the two-tower config), and the text towers of its kind.

What a text tower costs is counted at as many tokens as it has positions, which is what SigLIP's processor pads to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import InvalidConfigError
from .base import Family
from .parts import Depths, Grid


@dataclass(frozen=True)
class TowerFamily(Family):
    """Names of the parts in CLIP's and SigLIP's towers."""

    root: str = "vision_model"
    layers: str = "encoder.layers"
    patch: str = "embeddings.patch_embedding"
    norm1: str = "layer_norm1"
    norm2: str = "layer_norm2"
    attention: str = "self_attn"
    o: str = "out_proj"


@dataclass(frozen=True)
class ClipFamily(TowerFamily):
    def resize_config(self, config: Any, width: int, num_layers: int, depths: Depths) -> None:
        super().resize_config(config, width, num_layers, depths)
        # the stock config refuses a width that its heads do not divide; the layers' own heads are in the record
        c = self.sizes_config(config)
        c.num_attention_heads = math.gcd(width, c.num_attention_heads)

    def head_norm(self, task: str) -> str | None:
        """Classifiers read the average of the patches as they are."""
        return None if task == "ForImageClassification" else super().head_norm(task)


@dataclass(frozen=True)
class TextFamily(TowerFamily):
    part: str = field(default="text", kw_only=True)
    reads: str = field(default="text", kw_only=True)
    root: str = "text_model"
    patch: str = "embeddings.token_embedding"
    #: an embedding table is (tokens, width)
    stem_axis: int = 1
    norms: tuple[str, ...] = ("final_layer_norm",)
    extra_tokens: int = 0

    def grid(self, config: Any, image_size: int | Grid | None) -> Grid:
        """One row of as many tokens as there are positions.

        Raises:
            InvalidConfigError: an image size is given.
        """
        if image_size is not None:
            raise InvalidConfigError(
                f"{self.model_type} models read text, which has no image size: leave image_size={image_size!r} out"
            )
        return 1, self.sizes_config(config).max_position_embeddings

    def inputs(self, config: Any, size: Any = None, device: Any = "cpu", task: str = "Model") -> dict[str, Any]:
        tokens = self.grid(config, size)[1]
        ids = torch.randint(0, self.sizes_config(config).vocab_size, (1, tokens))
        return {"input_ids": ids.to(device)}


@dataclass(frozen=True)
class ClipTextFamily(TextFamily, ClipFamily):
    pass


CLIP_VISION = ClipFamily(model_type="clip_vision_model", norms=("pre_layrnorm", "post_layernorm"), convolutions=True)
#: the same tower under ``CLIPConfig``, as AutoModelForImageClassification maps it
CLIP = replace(CLIP_VISION, model_type="clip", sub_config="vision_config", refused_classes=("CLIPModel",))
CLIP_TEXT = ClipTextFamily(model_type="clip_text_model")
SIGLIP_TEXT = TextFamily(model_type="siglip_text_model")
SIGLIP2_TEXT = TextFamily(model_type="siglip2_text_model")
