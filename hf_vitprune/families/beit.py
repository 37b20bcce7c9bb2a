"""BEiT: relative position biases (of every layer, or one for all), bare LayerScale factors, mean pooling.

Behind the layers a feature pyramid may follow, with or without a segmentation head: its channels are its own, however
many the config gives it, and it reads a narrowed stream as a full one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..errors import InvalidPlanError
from ..utils.modules import resize_tensor
from .base import Family, LayerPaths
from .dinov2 import follow_stages
from .wide import WideMapsMixin, read_wide

TABLE = "relative_position_bias.relative_position_bias_table"


SEGMENTATION = "ForSemanticSegmentation"
#: what maps of features enter by, and what lies behind
NECK = ("fpn", "fpn1", "fpn2", "fpn3", "fpn4")
HEADS = ("decode_head", "auxiliary_head")


@dataclass(frozen=True)
class BeitFamily(Family):
    """Position biases are added to the attention mask outside of the attention, which has a stock forward."""

    #: table of the biases that all layers share, below the encoder
    shared_table: str = "shared_position_bias.relative_position_bias_table"

    def refused_units(self, config: PreTrainedConfig) -> dict[str, str]:
        shared = "all layers share one table of position biases (use_shared_relative_position_bias)"
        return {"heads": shared} if config.use_shared_relative_position_bias else {}

    def refused_sizes(self, config: PreTrainedConfig, layers: Sequence[Any]) -> str | None:
        shared, heads = self.refused_units(config).get("heads"), config.num_attention_heads
        for i, shape in enumerate(layers):
            if shared and shape.mixer == "attention" and shape.heads != heads:
                return f"layer {i}: {shared}, and so keep all {heads} heads; got {shape.heads}"
        return super().refused_sizes(config, layers)

    def has_neck(self, config: PreTrainedConfig, task: str) -> bool:
        return task == SEGMENTATION or (task == "Backbone" and config.add_fpn)

    def read_states(self, config: PreTrainedConfig, task: str, layers: int) -> list[int]:
        """The segmentation models count layers from 1, and read what enters a layer."""
        if task == SEGMENTATION:
            return [index % (layers + 1) - 1 for index in config.out_indices]
        return super().read_states(config, task, layers)

    def name_states(self, config: PreTrainedConfig, task: str, states: Sequence[int]) -> None:
        if task != SEGMENTATION:
            super().name_states(config, task, states)
        elif max(states) < config.num_hidden_layers:
            config.out_indices = [state + 1 for state in states]
        else:
            raise InvalidPlanError(
                f"a {self.model_type} {task} says which features it reads by the layers that these enter "
                "(out_indices): keep a layer above the last of them"
            )

    def fewest_layers(self, config: PreTrainedConfig, task: str, layers: int) -> int:
        return super().fewest_layers(config, task, layers) + (task == SEGMENTATION)

    def layer_paths(self, prefix: str, layer: str, config: PreTrainedConfig) -> LayerPaths:
        paths = super().layer_paths(prefix, layer, config)
        if config.layer_scale_init_value <= 0:
            paths = paths._replace(scale1=None, scale2=None)
        return paths._replace(bias_table=f"{paths.layer}.{TABLE}" if config.use_relative_position_bias else None)

    def stream_norms(self, model: nn.Module) -> list[str]:
        own = ["layernorm"] if self.encoder_path(model) and hasattr(model, "layernorm") else []  # of masked images
        return super().stream_norms(model) + own

    def head_norm(self, task: str) -> str | None:
        return None  # patches are averaged as they are

    def resize_config(
        self, config: PreTrainedConfig, hidden_size: int, num_layers: int, depths: tuple[int, ...] | None
    ) -> None:
        super().resize_config(config, hidden_size, num_layers, depths)
        follow_stages(config, num_layers)

    def finish_structure(self, model: nn.Module, config: PreTrainedConfig, dense_hidden_size: int) -> None:
        if config.hidden_size != dense_hidden_size and self.neck(model):
            self._make_neck(model, config, dense_hidden_size)
            self.narrow_stream(model, dense_hidden_size, config.hidden_size)
        if config.use_shared_relative_position_bias:
            name = self.encoder_path(model) + self.shared_table
            table = model.get_parameter(name)
            resize_tensor(model, name, (len(table), config.num_attention_heads))

    def neck(self, model: nn.Module) -> list[str]:
        there = dict(model.named_children())
        return [name for name in NECK if name in there and (name != "fpn" or type(there[name]) is not nn.Identity)]

    def _make_neck(self, model: Any, config: PreTrainedConfig, width: int) -> None:
        """The neck and heads of a stock model of the dense width."""
        full = copy.copy(config)
        full.hidden_size, full.num_attention_heads, full.num_hidden_layers = width, 1, 1
        stock = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers.models."))
        for name, module in stock(full).named_children():
            if name in (*NECK, *HEADS):
                setattr(model, name, module)
        if hasattr(model, "num_features"):
            model.num_features = [width] * len(model.num_features)

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        for name in self.neck(model):
            read_wide(model.get_submodule(name), WideMapsMixin, width, kept)

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
