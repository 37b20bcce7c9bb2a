"""SigLIP 2's vision tower: SigLIP's layers over patches of images of any shape, padded to one length (NaFlex)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from .base import pair
from .pooling import PoolingFamily


@dataclass(frozen=True)
class Siglip2Family(PoolingFamily):
    def grid(self, config: PreTrainedConfig, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
        c = self.sizes_config(config)
        if image_size is None:  # configs state a number of patches
            side = math.isqrt(c.num_patches)
            return side, side
        height, width = pair(image_size)
        return height // c.patch_size, width // c.patch_size

    def batches(self, config: PreTrainedConfig, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Images of as many patches together, without the padding behind them."""
        mask = batch.get("pixel_attention_mask")
        if mask is None:  # the models' forwards want to be told
            return [{**batch, "pixel_attention_mask": None}]
        rows = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        constant = {name: value for name, value in batch.items() if name not in rows}
        lengths = mask.sum(-1)
        found = []
        for length in lengths.unique().tolist():
            own = {name: value[lengths == length] for name, value in rows.items() if name != "pixel_attention_mask"}
            own["pixel_values"] = own["pixel_values"][:, :length]
            found.append({**constant, **own, "pixel_attention_mask": None})
        return found

    def _inputs(self, config: Any, size: tuple[int, int] | None, device: Any, task: str) -> dict[str, Any]:
        c = self.sizes_config(config)
        rows, columns = self.grid(config, size)
        patches = torch.randn(1, rows * columns, c.num_channels * c.patch_size**2, device=device)
        # the model reads the shapes as numbers; without padding there is nothing to mask
        shapes = torch.tensor([[rows, columns]], device="cpu" if str(device) == "meta" else device)
        return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}


SIGLIP2_VISION = Siglip2Family(
    model_type="siglip2_vision_model",
    reads="patches of images of any shape",
    pixel_axes=3,
    root="vision_model",
    layers="encoder.layers",
    patch="embeddings.patch_embedding",
    norm1="layer_norm1",
    norm2="layer_norm2",
    attention="self_attn",
    o="out_proj",
    norms=("post_layernorm",),
    extra_tokens=0,
    tiny={"num_patches": 4},
)
#: the same tower under ``Siglip2Config``, as AutoModelForImageClassification maps it
SIGLIP2 = replace(SIGLIP2_VISION, model_type="siglip2", sub_config="vision_config", refused_classes=("Siglip2Model",))
