"""BEiT: relative position biases (of every layer, or one for all), bare LayerScale factors, mean pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..utils.modules import resize_tensor
from .base import Family, LayerPaths
from .dinov2 import follow_stages

TABLE = "relative_position_bias.relative_position_bias_table"


@dataclass(frozen=True)
class BeitFamily(Family):
    """Position biases are added to the attention mask outside of the attention, which has a stock forward."""

    #: table of the biases that all layers share, below the encoder
    shared_table: str = "shared_position_bias.relative_position_bias_table"

    def units_of(self, config: PreTrainedConfig) -> frozenset[str]:
        return self.units - {"heads"} if config.use_shared_relative_position_bias else self.units

    def refused_sizes(self, config: PreTrainedConfig, layers: Sequence[Any]) -> str | None:
        shared, heads = config.use_shared_relative_position_bias, config.num_attention_heads
        for i, shape in enumerate(layers):
            if shared and shape.mixer == "attention" and shape.heads != heads:
                return (
                    f"layer {i}: all layers share one table of position biases (use_shared_relative_position_bias), "
                    f"and so keep all {heads} heads; got {shape.heads}"
                )
        return super().refused_sizes(config, layers)

    def layer_paths(self, prefix: str, layer: str, config: PreTrainedConfig) -> LayerPaths:
        paths = super().layer_paths(prefix, layer, config)
        if config.layer_scale_init_value <= 0:
            paths = paths._replace(scale1=None, scale2=None)
        return paths._replace(bias_table=f"{paths.layer}.{TABLE}" if config.use_relative_position_bias else None)

    def head_norm(self, task: str) -> str | None:
        return None  # patches are averaged as they are

    def resize_config(
        self, config: PreTrainedConfig, hidden_size: int, num_layers: int, depths: tuple[int, ...] | None
    ) -> None:
        super().resize_config(config, hidden_size, num_layers, depths)
        follow_stages(config, num_layers)

    def finish_structure(self, model: nn.Module, config: PreTrainedConfig, dense_hidden_size: int) -> None:
        if config.use_shared_relative_position_bias:
            name = self.encoder_path(model) + self.shared_table
            table = model.get_parameter(name)
            resize_tensor(model, name, (len(table), config.num_attention_heads))

    def without_attention(self, layer: nn.Module) -> None:
        layer.relative_position_bias = None  # type: ignore[assignment]


BEIT = BeitFamily(
    model_type="beit",
    root="beit",
    scale1="lambda_1",
    scale2="lambda_2",
    norms=("layernorm", "pooler.layernorm"),
    config_head_dim=True,
    convolutions=True,
    interpolates=False,  # they always do
)
