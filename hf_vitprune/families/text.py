"""Text towers of CLIP and SigLIP: the layers of their vision towers over tokens of text.

What they cost is counted at as many tokens as they have positions, which is what SigLIP's processor pads to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import InvalidConfigError
from .base import Family
from .clip import ClipFamily


@dataclass(frozen=True)
class TextFamily(Family):
    part: str = field(default="text", kw_only=True)
    reads: str = field(default="text", kw_only=True)
    root: str = "text_model"
    layers: str = "encoder.layers"
    patch: str = "embeddings.token_embedding"
    #: an embedding table is (tokens, width)
    stem_axis: int = 1
    norm1: str = "layer_norm1"
    norm2: str = "layer_norm2"
    attention: str = "self_attn"
    o: str = "out_proj"
    norms: tuple[str, ...] = ("final_layer_norm",)
    extra_tokens: int = 0

    def grid(self, config: PreTrainedConfig, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
        """One row of as many tokens as there are positions.

        Raises:
            InvalidConfigError: an image size is given.
        """
        if image_size is not None:
            raise InvalidConfigError(
                f"{self.model_type} models read text, which has no image size: leave image_size={image_size!r} out"
            )
        return 1, self.sizes_config(config).max_position_embeddings

    def _inputs(self, config: Any, size: tuple[int, int] | None, device: Any, task: str) -> dict[str, Any]:
        tokens = self.grid(config, size)[1]
        ids = torch.randint(0, self.sizes_config(config).vocab_size, (1, tokens))
        return {"input_ids": ids.to(device)}


@dataclass(frozen=True)
class ClipTextFamily(TextFamily, ClipFamily):
    pass


CLIP_TEXT = ClipTextFamily(model_type="clip_text_model")
SIGLIP_TEXT = TextFamily(model_type="siglip_text_model")
SIGLIP2_TEXT = TextFamily(model_type="siglip2_text_model")
