"""Swin v2: norms behind the branches, cosine attention of a learned temperature, position biases from a small MLP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .base import LayerPaths
from .swin import SwinFamily

#: neurons of the MLP that makes position biases of two coordinates
HIDDEN = 512


@dataclass(frozen=True)
class Swinv2Family(SwinFamily):
    """Queries and keys are divided by their lengths over a whole head, and one view serves them and the values."""

    def refused_units(self, config: PreTrainedConfig) -> dict[str, str]:
        cosine = "cosine attention divides queries and keys by their lengths over whole heads"
        view = "the heads of queries, keys and values are made by one view of one size"
        return {**super().refused_units(config), "qk": cosine, "v": view}

    def refused_sizes(self, config: PreTrainedConfig, layers: Sequence[Any]) -> str | None:
        sizes = {dense.head_dim for dense in self.dense_layers(config)}
        for i, shape in enumerate(layers):
            if shape.mixer == "attention" and not {shape.qk_dim, shape.v_dim} <= sizes:
                return (
                    f"layer {i}: cosine attention is over whole heads, whose channels (qk, v) all stay; got "
                    f"{shape.qk_dim} and {shape.v_dim}"
                )
        return super().refused_sizes(config, layers)

    def layer_paths(self, prefix: str, layer: str, config: PreTrainedConfig) -> LayerPaths:
        paths, base = super().layer_paths(prefix, layer, config), prefix + layer
        own = ((f"{paths.attention}.logit_scale", 0), (f"{paths.attention}.continuous_position_bias_mlp.2.weight", 0))
        return paths._replace(o=f"{base}.attention.output.dense", fc2=f"{base}.output.dense", of_heads=own)

    @property
    def output_name(self) -> str | None:
        return None

    def other_attention_macs(self, config: PreTrainedConfig, heads: int, stage: int) -> int:
        side = min(config.window_size, self.grid(config, None)[0] // 2**stage)
        return (2 * side - 1) ** 2 * HIDDEN * (2 + heads)

    def configure_layer(self, layer: nn.Module, config: PreTrainedConfig, shifted: bool | None) -> None:
        block: Any = layer  # no shift where one window covers the grid
        size, shift = config.window_size, config.window_size // 2 if shifted else 0
        block.shift_size = block._compute_window_shift((size, size), (shift, shift))[1][0]


SWINV2 = Swinv2Family(
    model_type="swinv2",
    width_field="embed_dim",
    tiny={"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 2},
    root="swinv2",
    layers="encoder.layers",
    attention="attention.self",
    q="query",
    k="key",
    v="value",
    mlp="intermediate",
    fc1=("dense",),
    extra_tokens=0,
    plain_qk=False,
    post_norm=True,
    own_attention=False,
)
