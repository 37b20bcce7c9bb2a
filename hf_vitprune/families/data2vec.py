"""data2vec for images: BEiT with projections beside attention and MLP, and no scale that an attention keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .base import LayerPaths
from .beit import SEGMENTATION, TABLE, BeitFamily


def add_biases(module: Any, attention_mask: Any, input_shape: tuple[int, ...], kwargs: dict[str, Any]) -> Any:
    """Position biases of the layer and of all layers: (1, heads, tokens, tokens), or None."""
    shared, interpolate, size = (kwargs.pop(name, None) for name in INPUTS)
    if not module.has_relative_position_bias:
        return shared
    grid = tuple(side // module.config.patch_size for side in size)
    own = module.relative_position_bias(grid, interpolate, dim_size=input_shape[1])
    return own if shared is None else own + shared


#: what the encoder tells its attentions
INPUTS = ("relative_position_bias", "interpolate_pos_encoding", "resolution")


@dataclass(frozen=True)
class Data2VecFamily(BeitFamily):
    shared_table: str = "encoder.relative_position_bias.relative_position_bias_table"

    def layer_paths(self, prefix: str, layer: str, config: PreTrainedConfig) -> LayerPaths:
        paths, base = super().layer_paths(prefix, layer, config), prefix + layer
        table = f"{paths.attention}.{TABLE}" if config.use_relative_position_bias else None
        return paths._replace(o=f"{base}.attention.output.dense", fc2=f"{base}.output.dense", bias_table=table)

    @property
    def output_name(self) -> str | None:
        return None

    def resize_config(
        self, config: PreTrainedConfig, hidden_size: int, num_layers: int, depths: tuple[int, ...] | None
    ) -> None:
        config.hidden_size, config.num_hidden_layers = hidden_size, num_layers

    def has_neck(self, config: PreTrainedConfig, task: str) -> bool:
        return task == SEGMENTATION

    def fixed_size(self, config: PreTrainedConfig, task: str) -> bool:
        """The pyramid lays tokens out on the config's grid."""
        return task == SEGMENTATION

    def without_attention(self, layer: nn.Module) -> None:
        """The table of a layer is in its attention."""


DATA2VEC_VISION = Data2VecFamily(
    model_type="data2vec-vision",
    root="data2vec_vision",
    layers="encoder.layer",
    attention="attention.attention",
    q="query",
    k="key",
    v="value",
    mlp="intermediate",
    fc1=("dense",),
    scale1="lambda_1",
    scale2="lambda_2",
    norms=("layernorm", "pooler.layernorm"),
    attention_bias=add_biases,
    attention_inputs=("output_attentions", *INPUTS),
    fixed_head_dim=True,  # its scale follows from the size of its heads
    interpolates=False,  # they always do
)
