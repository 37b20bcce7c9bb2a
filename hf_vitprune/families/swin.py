"""Swin and Swin v2: stages of (shifted) window attention with position biases, patch merging between stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..utils.mixing import InPlaceMixin
from .base import Family, pair
from .parts import NESTED, Depths, Grid, LayerPaths, LayerSizes


def window_bias(module: Any, attention_mask: Any, input_shape: tuple[int, ...], kwargs: dict[str, Any]) -> Any:
    """Position bias of every head, plus the shift mask of every window: ``(1 or windows * batch, heads, n, n)``."""
    bias = module.relative_position_bias()
    if attention_mask is None:
        return bias
    windows, length, _ = attention_mask.shape
    images = input_shape[0] // windows
    mask = attention_mask[None, :, None].expand(images, windows, 1, length, length)
    return bias + mask.reshape(images * windows, 1, length, length)


def cut_windows(layer: Any, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(B, rows * columns, C) of the grid, padded, shifted and cut as a layer does: (B * windows, side * side, C)."""
    padded, _ = layer.maybe_pad(tokens.unflatten(1, grid), *grid)
    side = layer.window_size
    shifted = layer.cyclic_shift(padded).unflatten(2, (-1, side)).unflatten(1, (-1, side))
    return shifted.transpose(2, 3).flatten(3, 4).flatten(0, 2)


class WholeGridMixin(InPlaceMixin):
    """A Swin layer whose mixer takes the whole grid of its stage: no windows, no shift, no padding."""

    def forward(
        self, hidden_states: torch.Tensor, input_dimensions: tuple[int, int], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer: Any = self
        mixed, weights = layer.attention(layer.layernorm_before(hidden_states), patch_grid=input_dimensions)
        hidden_states = hidden_states + layer.drop_path(layer.dropout(mixed))
        return hidden_states + layer.dropout(layer.mlp(layer.layernorm_after(hidden_states))), weights


@dataclass(frozen=True)
class SwinFamily(Family):
    width_field: str = "embed_dim"
    layers: str = "encoder.layers"
    extra_tokens: int = 0

    def dense_layers(self, config: Any) -> list[LayerSizes]:
        sizes = []
        for stage, depth in enumerate(config.depths):
            width = config.embed_dim * 2**stage
            heads = config.num_heads[stage]
            sizes += [LayerSizes(width, heads, width // heads, int(config.mlp_ratio * width))] * depth
        return sizes

    def refused_units(self, config: Any) -> dict[str, str]:
        return {"embedding": "patch merging mixes the channels of four patches between the stages"}

    def depths(self, config: Any) -> tuple[int, ...]:
        return tuple(config.depths)

    def width_factor(self, stage: int) -> int:
        return 2**stage

    def resize_config(self, config: Any, width: int, num_layers: int, depths: Depths) -> None:
        # the residual width of Swin is fixed (patch merging mixes it); only the depth of the stages changes
        if depths is not None:
            config.depths = list(depths)

    def skeleton_heads(self, config: Any) -> dict[str, Any]:
        return {"num_heads": [1] * len(config.depths)}

    def uniform_config(self, config: Any, heads: int, head_dim: int, mlp: int, width: int) -> dict[str, Any]:
        raise ValueError("stock Swin models fix heads and MLP ratio of every stage; only whole layers can be removed")

    def layer_names(self, num_layers: int, depths: Depths) -> list[str]:
        assert depths is not None
        return [f"{self.layers}.{s}.blocks.{b}" for s, depth in enumerate(depths) for b in range(depth)]

    def output_names(self, num_layers: int, depths: Depths) -> list[str]:
        assert depths is not None
        names = self.layer_names(num_layers, depths)
        for stage in range(len(depths) - 1):  # what the next stage reads: the merged patches
            names[sum(depths[: stage + 1]) - 1] = f"{self.layers}.{stage}.downsample"
        return names

    def configure_layer(self, layer: nn.Module, config: Any, shifted: bool | None) -> None:
        # a layer keeps the shift it was trained with, wherever it ends up in its stage
        layer.shift_size = config.window_size // 2 if shifted else 0  # type: ignore[assignment]

    def grid(self, config: Any, image_size: int | Grid | None) -> Grid:
        height, width = pair(config.image_size if image_size is None else image_size)
        patch_h, patch_w = pair(config.patch_size)
        return -(-height // patch_h), -(-width // patch_w)  # Swin pads the image up to whole patches

    def stage_grid(self, grid: Grid, stage: int) -> Grid:
        for _ in range(stage):
            grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        return grid

    def grid_tokens(self, grid: Grid, stage: int) -> int:
        rows, columns = self.stage_grid(grid, stage)
        return rows * columns

    def attention_tokens(self, config: Any, grid: Grid, kind: int) -> tuple[int, int, int]:
        rows, columns = self.stage_grid(grid, kind)
        window = min(config.window_size, rows, columns)
        windows = -(-rows // window) * -(-columns // window)
        return rows * columns, windows * window**2, windows * window**4


#: neurons of the MLP of Swin v2 that makes position biases of two coordinates
HIDDEN = 512


@dataclass(frozen=True)
class Swinv2Family(SwinFamily):
    """Norms behind the branches, cosine attention of a learned temperature, position biases from a small MLP.

    Queries and keys are divided by their lengths over a whole head, and one view serves them and the values.
    """

    def refused_units(self, config: Any) -> dict[str, str]:
        cosine = "cosine attention divides queries and keys by their lengths over whole heads"
        view = "the heads of queries, keys and values are made by one view of one size"
        return {**super().refused_units(config), "qk": cosine, "v": view}

    def refused_attention(self, config: Any, shape: Any) -> str | None:
        if {shape.qk_dim, shape.v_dim} <= {dense.head_dim for dense in self.dense_layers(config)}:
            return None
        return (
            f"cosine attention is over whole heads, whose channels (qk, v) all stay; got {shape.qk_dim} and "
            f"{shape.v_dim}"
        )

    def layer_paths(self, prefix: str, layer: str, config: Any) -> LayerPaths:
        paths = super().layer_paths(prefix, layer, config)
        own = ((f"{paths.attention}.logit_scale", 0), (f"{paths.attention}.continuous_position_bias_mlp.2.weight", 0))
        return paths._replace(of_heads=own)

    def other_attention_macs(self, config: Any, heads: int, stage: int) -> int:
        side = min(config.window_size, self.grid(config, None)[0] // 2**stage)
        return (2 * side - 1) ** 2 * HIDDEN * (2 + heads)

    def configure_layer(self, layer: nn.Module, config: Any, shifted: bool | None) -> None:
        block: Any = layer  # no shift where one window covers the grid
        size, shift = config.window_size, config.window_size // 2 if shifted else 0
        block.shift_size = block._compute_window_shift((size, size), (shift, shift))[1][0]


TINY = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "patch_size": 2}
SWIN = SwinFamily(
    model_type="swin",
    root="swin",
    bias_table="relative_position_bias.relative_position_bias_table",
    attention_bias=window_bias,
    convolutions=True,
    grid_layer=WholeGridMixin,
    windows=cut_windows,
    tiny=TINY,
)
SWINV2 = Swinv2Family(
    **{**NESTED, "attention": "attention.self"},
    model_type="swinv2",
    root="swinv2",
    plain_qk=False,
    post_norm=True,
    own_attention=False,
    tiny=TINY,
)
