"""DINOv3: rotary positions on queries and keys, register tokens, LayerScale, a plain or gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .base import Family


def rotate(
    module: Any, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries and keys (batch, heads, tokens, qk_dim) by the angles of the channels that they kept."""
    from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb  # not with the package

    channels = module.qk_index.unflatten(0, (query.shape[1], -1))
    cos, sin = (table[:, channels].transpose(0, 1) for table in kwargs.pop("position_embeddings"))
    return apply_rotary_pos_emb(query, key, cos, sin)


@dataclass(frozen=True)
class Dinov3Family(Family):
    def fc1_names(self, config: Any) -> tuple[str, ...]:
        return ("gate_proj", "up_proj") if config.use_gated_mlp else ("up_proj",)

    def uniform_config(self, config: Any, heads: int, head_dim: int, mlp: int, width: int) -> dict[str, Any]:
        dense = config.hidden_size // config.num_attention_heads
        if head_dim != dense:
            raise ValueError(
                f"stock {self.model_type} models make their rotary angles from head_dim, which is {head_dim} here and "
                f"was {dense}"
            )
        return super().uniform_config(config, heads, head_dim, mlp, width)

    def finish_structure(self, model: nn.Module, config: Any, dense_width: int) -> None:
        # the angles are those of the dense model's heads, of which pruned ones keep some
        rope: Any = model.rope_embeddings
        rope.head_dim = dense_width // config.num_attention_heads
        rope.inv_freq = nn.Buffer(torch.empty(rope.head_dim // 4), persistent=False)


DINOV3 = Dinov3Family(
    model_type="dinov3_vit",
    root="dinov3_vit",  # no stock class holds the encoder under a name
    layers="model.layer",
    patch="embeddings.patch_embeddings",
    norm1="norm1",
    norm2="norm2",
    fc2="down_proj",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
    norms=("norm",),
    extra_token_fields=("num_register_tokens",),
    rotate=rotate,
    attention_inputs=("position_embeddings",),
    qk_pairs=True,
    fixed_head_dim=True,
    plain_qk=False,
    interpolates=False,  # positions are angles, of any size
    convolutions=True,
)
