"""BEiT and data2vec: relative position biases (of a layer or of all), bare LayerScale factors, mean pooling.

Behind the layers a feature pyramid may follow, with or without a segmentation head: its channels are its own, however
many the config gives it, and it reads a narrowed stream as a full one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import InvalidPlanError
from ..utils.modules import resize_tensor
from .base import Family
from .narrowed import WideMapsMixin, narrow_module
from .parts import NESTED, LayerPaths

TABLE = "relative_position_bias.relative_position_bias_table"
SEGMENTATION = "ForSemanticSegmentation"
#: what maps of features enter by, and what lies behind
NECK = ("fpn", "fpn1", "fpn2", "fpn3", "fpn4")
HEADS = ("decode_head", "auxiliary_head")


@dataclass(frozen=True)
class BeitFamily(Family):
    """Position biases are added to the attention mask outside of the attention, which has a stock forward."""

    scale1: str | None = "lambda_1"
    scale2: str | None = "lambda_2"
    norms: tuple[str, ...] = ("layernorm", "pooler.layernorm")
    interpolates: bool = False  # they always do
    #: table of the biases that all layers share, below the encoder
    shared_table: str = "shared_position_bias.relative_position_bias_table"

    def refused_units(self, config: Any) -> dict[str, str]:
        shared = "all layers share one table of position biases (use_shared_relative_position_bias)"
        return {"heads": shared} if config.use_shared_relative_position_bias else {}

    def refused_attention(self, config: Any, shape: Any) -> str | None:
        shared, heads = self.refused_units(config).get("heads"), config.num_attention_heads
        return (
            f"{shared}, and so keep all {heads} heads; got {shape.heads}" if shared and shape.heads != heads else None
        )

    def has_neck(self, config: Any, task: str) -> bool:
        return task == SEGMENTATION or (task == "Backbone" and config.add_fpn)

    def read_states(self, config: Any, task: str, layers: int) -> list[int]:
        """The segmentation models count layers from 1, and read what enters a layer."""
        if task == SEGMENTATION:
            return [index % (layers + 1) - 1 for index in config.out_indices]
        return super().read_states(config, task, layers)

    def name_states(self, config: Any, task: str, states: Sequence[int]) -> None:
        if task != SEGMENTATION:
            super().name_states(config, task, states)
        elif max(states) < config.num_hidden_layers:
            config.out_indices = [state + 1 for state in states]
        else:
            raise InvalidPlanError(
                f"a {self.model_type} {task} says which features it reads by the layers that these enter "
                "(out_indices): keep a layer above the last of them"
            )

    def fewest_layers(self, config: Any, task: str, layers: int) -> int:
        return super().fewest_layers(config, task, layers) + (task == SEGMENTATION)

    def layer_paths(self, prefix: str, layer: str, config: Any) -> LayerPaths:
        paths = super().layer_paths(prefix, layer, config)
        if config.layer_scale_init_value <= 0:
            paths = paths._replace(scale1=None, scale2=None)
        return paths._replace(bias_table=self.own_table(paths) if config.use_relative_position_bias else None)

    def own_table(self, paths: LayerPaths) -> str:
        return f"{paths.layer}.{TABLE}"

    def head_norm(self, task: str) -> str | None:
        return None  # patches are averaged as they are

    def finish_structure(self, model: nn.Module, config: Any, dense_width: int) -> None:
        if config.hidden_size != dense_width and self.neck(model):
            self._make_neck(model, config, dense_width)
        if config.use_shared_relative_position_bias:
            name = self.encoder_path(model) + self.shared_table
            resize_tensor(model, name, (len(model.get_parameter(name)), config.num_attention_heads))
        super().finish_structure(model, config, dense_width)

    def neck(self, model: nn.Module) -> list[str]:
        there = dict(model.named_children())
        return [name for name in NECK if name in there and (name != "fpn" or type(there[name]) is not nn.Identity)]

    def _make_neck(self, model: Any, config: Any, width: int) -> None:
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
            narrow_module(model.get_submodule(name), WideMapsMixin, width, kept)

    def without_attention(self, layer: nn.Module) -> None:
        layer.relative_position_bias = None  # type: ignore[assignment]


#: what data2vec's encoder tells its attentions
INPUTS = ("relative_position_bias", "interpolate_pos_encoding", "resolution")


def add_biases(module: Any, attention_mask: Any, input_shape: tuple[int, ...], kwargs: dict[str, Any]) -> Any:
    """Position biases of the layer and of all layers: (1, heads, tokens, tokens), or None."""
    shared, interpolate, size = (kwargs.pop(name, None) for name in INPUTS)
    if not module.has_relative_position_bias:
        return shared
    grid = tuple(side // module.config.patch_size for side in size)
    own = module.relative_position_bias(grid, interpolate, dim_size=input_shape[1])
    return own if shared is None else own + shared


@dataclass(frozen=True)
class Data2VecFamily(BeitFamily):
    """BEiT with projections beside attention and MLP; a layer's table is in its attention."""

    shared_table: str = "encoder.relative_position_bias.relative_position_bias_table"

    def own_table(self, paths: LayerPaths) -> str:
        return f"{paths.attention}.{TABLE}"

    def has_neck(self, config: Any, task: str) -> bool:
        return task == SEGMENTATION

    def fixed_size(self, config: Any, task: str) -> bool:
        """The pyramid lays tokens out on the config's grid."""
        return task == SEGMENTATION

    def without_attention(self, layer: nn.Module) -> None:
        """Nothing is left behind."""


BEIT = BeitFamily(
    model_type="beit",
    root="beit",
    outer_norms=("layernorm",),  # of masked images
    config_head_dim=True,
    convolutions=True,
)
DATA2VEC_VISION = Data2VecFamily(
    **NESTED,
    model_type="data2vec-vision",
    root="data2vec_vision",
    layers="encoder.layer",
    attention_bias=add_biases,
    attention_inputs=("output_attentions", *INPUTS),
    fixed_head_dim=True,  # its scale follows from the size of its heads
)
