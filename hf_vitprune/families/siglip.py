"""SigLIP's vision tower: no CLS token, an attention-pooling head that keeps its own full width."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..utils.mixing import InPlaceMixin, mix_into
from .base import Family, Part


class WideInputMixin(InPlaceMixin):
    """Pooling head of a narrowed tower: kept channels go back to their places, the removed ones are zero.

    The head's output is compared with text embeddings, so its width is not ours to change.
    """

    def widen(self, width: int, kept: int) -> None:
        self.full_width = width
        index = torch.arange(kept, device="meta")
        self.register_buffer("input_index", index)  # type: ignore[attr-defined]

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        full = hidden_state.new_zeros(*hidden_state.shape[:-1], self.full_width)
        full = full.index_copy(-1, self.input_index, hidden_state)  # type: ignore[attr-defined]
        return super().forward(full)  # type: ignore[misc]


@dataclass(frozen=True)
class SiglipFamily(Family):
    def finish_structure(self, model: nn.Module, config: PreTrainedConfig, dense_hidden_size: int) -> None:
        tower: Any = getattr(model, self.root, model)
        if not getattr(tower, "use_head", False):
            return
        head_class = type(tower.head)
        full = copy.copy(self.sizes_config(config))
        full.hidden_size = dense_hidden_size
        tower.head = head_class(full)
        self.narrow_stream(model, dense_hidden_size, self.sizes_config(config).hidden_size)

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        tower: Any = getattr(model, self.root, model)
        if not getattr(tower, "use_head", False) or kept == width:
            return
        if isinstance(tower.head, WideInputMixin):  # it was narrowed before
            width = tower.head.full_width
        mix_into(tower.head, WideInputMixin)
        tower.head.widen(width, kept)

    def uniform_config(
        self, config: PreTrainedConfig, heads: int, head_dim: int, mlp: int, hidden_size: int
    ) -> dict[str, Any]:
        c = self.sizes_config(config)
        dense = (c.num_attention_heads, c.intermediate_size, c.hidden_size)
        if c.vision_use_head and (heads, mlp, hidden_size) != dense:
            raise ValueError(
                f"the pooling head of stock {self.model_type} models takes heads, MLP and width from the config too, "
                f"and keeps {dense[0]}, {dense[1]} and {dense[2]}; the layers have {heads}, {mlp} and {hidden_size}"
            )
        return super().uniform_config(config, heads, head_dim, mlp, hidden_size)

    def outer_parts(self, config: PreTrainedConfig, width: int, task: str, grid: tuple[int, int]) -> list[Part]:
        c = self.sizes_config(config)
        patches = grid[0] * grid[1]
        parts = [
            self.patch_part(config, width, grid),
            self.table_part("positions", self.positions(config), width),
            self.table_part("final norm", 2, width),
        ]
        if c.vision_use_head:
            # one query against all patches, at the dense width; SigLIP runs it under every task
            full = c.hidden_size
            head = [
                self.linear_part("pooling q", full, full),
                self.linear_part("pooling k", full, full, tokens=patches),
                self.linear_part("pooling v", full, full, tokens=patches),
                self.linear_part("pooling out", full, full),
                Part("pooling attention", 0, 0, 2 * patches * full),
                self.table_part("pooling probe and norm", 3, full),
                self.linear_part("pooling fc1", full, c.intermediate_size),
                self.linear_part("pooling fc2", c.intermediate_size, full),
            ]
            parts += head
        if task == "ForImageClassification" and self.labels(config):
            parts.append(self.linear_part("classifier", width, self.labels(config)))
        return parts


SIGLIP_VISION = SiglipFamily(
    model_type="siglip_vision_model",
    root="vision_model",
    layers="encoder.layers",
    patch="embeddings.patch_embedding",
    norm1="layer_norm1",
    norm2="layer_norm2",
    attention="self_attn",
    o="out_proj",
    norms=("post_layernorm",),
    extra_tokens=0,
    convolutions=True,
)
#: the same tower under ``SiglipConfig``, as AutoModelForImageClassification maps it
SIGLIP = replace(SIGLIP_VISION, model_type="siglip", sub_config="vision_config", refused_classes=("SiglipModel",))
