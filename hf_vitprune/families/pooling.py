"""Attention pooling over the patches, whose width is not ours to change: its output meets text embeddings."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .base import Family
from .wide import WideInputMixin, read_wide


@dataclass(frozen=True)
class PoolingFamily(Family):
    """A tower that may end in ``head``, which has the dense width, heads and MLP of the config."""

    #: field of the config that says whether there is one
    head_field: str = "vision_use_head"

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
        if getattr(tower, "use_head", False):
            read_wide(tower.head, WideInputMixin, width, kept)

    def uniform_config(
        self, config: PreTrainedConfig, heads: int, head_dim: int, mlp: int, hidden_size: int
    ) -> dict[str, Any]:
        c = self.sizes_config(config)
        dense = (c.num_attention_heads, c.intermediate_size, c.hidden_size)
        if getattr(c, self.head_field) and (heads, mlp, hidden_size) != dense:
            raise ValueError(
                f"the pooling head of stock {self.model_type} models takes heads, MLP and width from the config too, "
                f"and keeps {dense[0]}, {dense[1]} and {dense[2]}; the layers have {heads}, {mlp} and {hidden_size}"
            )
        return super().uniform_config(config, heads, head_dim, mlp, hidden_size)
