"""Vision towers that may end in attention pooling: SigLIP's, SigLIP 2's (images of any shape, NaFlex), AIMv2's."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .base import pair
from .clip import TowerFamily
from .narrowed import NarrowedMixin, WideInputMixin, narrow_module
from .parts import Grid


@dataclass(frozen=True)
class PoolingFamily(TowerFamily):
    """A tower that may end in ``head``, which keeps the dense width, heads and MLP: its output meets text embeddings.

    Patches come without special tokens.
    """

    norms: tuple[str, ...] = ("post_layernorm",)
    extra_tokens: int = 0
    #: field of the config that says whether there is a head
    head_field: str = "vision_use_head"

    def finish_structure(self, model: nn.Module, config: Any, dense_width: int) -> None:
        tower = self.encoder(model)
        if getattr(tower, "use_head", False):
            full = copy.copy(self.sizes_config(config))
            full.hidden_size = dense_width
            tower.head = type(tower.head)(full)
        super().finish_structure(model, config, dense_width)

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        tower = self.encoder(model)
        if getattr(tower, "use_head", False):
            narrow_module(tower.head, WideInputMixin, width, kept)

    def uniform_config(self, config: Any, heads: int, head_dim: int, mlp: int, width: int) -> dict[str, Any]:
        c = self.sizes_config(config)
        dense = (c.num_attention_heads, c.intermediate_size, c.hidden_size)
        if getattr(c, self.head_field) and (heads, mlp, width) != dense:
            raise ValueError(
                f"the pooling head of stock {self.model_type} models takes heads, MLP and width from the config too, "
                f"and keeps {dense[0]}, {dense[1]} and {dense[2]}; the layers have {heads}, {mlp} and {width}"
            )
        return super().uniform_config(config, heads, head_dim, mlp, width)


@dataclass(frozen=True)
class Siglip2Family(PoolingFamily):
    """Patches are padded to one length."""

    def grid(self, config: Any, image_size: int | Grid | None) -> Grid:
        c = self.sizes_config(config)
        if image_size is None:  # configs state a number of patches
            side = math.isqrt(c.num_patches)
            return side, side
        height, width = pair(image_size)
        return height // c.patch_size, width // c.patch_size

    def batches(self, config: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
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

    def inputs(self, config: Any, size: Any = None, device: Any = "cpu", task: str = "Model") -> dict[str, Any]:
        c = self.sizes_config(config)
        rows, columns = self.grid(config, size)
        patches = torch.randn(1, rows * columns, c.num_channels * c.patch_size**2, device=device)
        # the model reads the shapes as numbers; without padding there is nothing to mask
        shapes = torch.tensor([[rows, columns]], device="cpu" if str(device) == "meta" else device)
        return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}


class KeptGridPositionsMixin(NarrowedMixin):
    """Embeddings of a native AIMv2: positions are computed for the dense width, and the kept ones taken."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        module: Any = self
        patches = module.patch_embed(pixel_values)
        rows, columns = patches.shape[-2:]
        tokens = module.rms_norm(patches.flatten(2).transpose(1, 2))
        make = sys.modules[self.stock_class.__module__].build_2d_sinusoidal_position_embedding
        table = make(rows, columns, self.full_width, device=tokens.device, dtype=tokens.dtype)
        table = table.roll(self.full_width // 2, -1)  # the model's halves are the other way round
        return tokens + table.index_select(-1, module.input_index)


@dataclass(frozen=True)
class Aimv2Family(PoolingFamily):
    """RMSNorms, gated MLPs, Linears without biases, positions learned or (native) computed."""

    head_field: str = "use_head"

    def fixed_size(self, config: Any, task: str) -> bool:
        return not config.is_native

    def narrow_stream(self, model: Any, width: int, kept: int) -> None:
        super().narrow_stream(model, width, kept)
        if model.config.is_native:
            narrow_module(self.encoder(model).embeddings, KeptGridPositionsMixin, width, kept)


SIGLIP_VISION = PoolingFamily(model_type="siglip_vision_model", convolutions=True)
SIGLIP2_VISION = Siglip2Family(
    model_type="siglip2_vision_model",
    reads="patches of images of any shape",
    pixel_axes=3,
    tiny={"num_patches": 4},
)
#: the same towers under two-tower configs, as AutoModelForImageClassification maps them
SIGLIP = replace(SIGLIP_VISION, model_type="siglip", sub_config="vision_config", refused_classes=("SiglipModel",))
SIGLIP2 = replace(SIGLIP2_VISION, model_type="siglip2", sub_config="vision_config", refused_classes=("Siglip2Model",))
AIMV2_VISION = Aimv2Family(
    model_type="aimv2_vision_model",
    patch="embeddings.patch_embed",
    norm1="rms_norm1",
    norm2="rms_norm2",
    attention="attention",
    mlp="ffn",
    fc1=("gate_proj", "up_proj"),
    fc2="down_proj",
    norms=("embeddings.rms_norm", "rms_norm"),
    convolutions=True,
    interpolates=False,
)
