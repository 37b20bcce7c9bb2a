"""DINOv2 and what is made like it: DINOv2 with registers, Pixio, RADIO, RF-DETR's and ViTPose's backbones."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UnsupportedModelError
from .base import Family
from .parts import Grid, LayerSizes

#: largest whole mlp_ratio that is tried; published models have 4
MAX_MLP_RATIO = 64


def is_gated(config: Any) -> bool:
    """Whether the MLPs are SwiGLU ones."""
    return bool(getattr(config, "use_swiglu_ffn", False))


@dataclass(frozen=True)
class Dinov2Family(Family):
    """LayerScale, optional SwiGLU, a classifier on CLS and mean patch side by side."""

    interpolates: bool = False  # they always do

    def mlp_size(self, c: Any) -> int:
        hidden = int(c.hidden_size * c.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if is_gated(c) else hidden

    def fc1_names(self, config: Any) -> tuple[str, ...]:
        return ("gate_proj", "up_proj") if is_gated(config) else ("fc1",)

    def fc2_name(self, config: Any) -> str:
        return "down_proj" if is_gated(config) else "fc2"

    def mlp_fields(self, config: Any, mlp: int, width: int) -> dict[str, Any]:
        wide = copy.copy(config)
        wide.hidden_size = width
        for ratio in range(1, MAX_MLP_RATIO + 1):
            wide.mlp_ratio = type(config.mlp_ratio)(ratio)
            if self.mlp_size(wide) == mlp:
                return {"mlp_ratio": wide.mlp_ratio}
        raise ValueError(
            f"stock {self.model_type} configs hold a whole mlp_ratio, and none makes an MLP of {mlp} at width {width}"
        )


@dataclass(frozen=True)
class RfDetrFamily(Dinov2Family):
    """Patches stay in windows, each with the CLS token. A layer attends to one window or to all, by its number.

    Stock code finds these numbers (``window_block_indexes``) anew from ``out_features`` whenever it reads a config, so
    no layer can go.
    """

    def refused_units(self, config: Any) -> dict[str, str]:
        if config.num_windows == 1:
            return {}
        return {"layers": "a layer's number says whether it attends to one window or to all (out_features)"}

    def kinds(self, config: Any, stages: list[int]) -> list[int]:
        """1 for layers that attend to all windows."""
        if config.num_windows == 1:
            return stages
        return [int(i not in config.window_block_indexes) for i in range(len(stages))]

    def sequences(self, config: Any) -> int:
        return config.num_windows**2

    def attention_tokens(self, config: Any, grid: Grid, kind: int) -> tuple[int, int, int]:
        windows = config.num_windows**2
        tokens = grid[0] * grid[1] + windows
        return tokens, tokens, tokens**2 if kind else tokens**2 // windows


@dataclass(frozen=True)
class VitPoseFamily(Dinov2Family):
    """Nested attention as VideoMAE's, ViT's MLP, images of one size."""

    def dense_layers(self, config: Any) -> list[LayerSizes]:
        """As all families.

        Raises:
            UnsupportedModelError: several experts compute a part of what an MLP writes (ViTPose++).
        """
        if config.num_experts > 1:
            raise UnsupportedModelError(
                f"a {self.model_type} of {config.num_experts} experts (num_experts) is not known here: make one of a "
                "single expert, with the rows of its weights behind those of fc2"
            )
        return super().dense_layers(config)

    def fixed_size(self, config: Any, task: str) -> bool:
        return True


_NAMES: dict[str, Any] = {
    "layers": "encoder.layer",
    "norm1": "norm1",
    "norm2": "norm2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
}
DINOV2 = Dinov2Family(**_NAMES, model_type="dinov2", root="dinov2", config_head_dim=True, convolutions=True)
DINOV2_WITH_REGISTERS = replace(
    DINOV2,
    model_type="dinov2_with_registers",
    root="dinov2_with_registers",
    extra_token_fields=("num_register_tokens",),
)
#: ViT's layers behind several CLS tokens; the backbone has a norm of its own
PIXIO = Dinov2Family(
    model_type="pixio",
    not_stock=("Backbone",),  # its two norms change places
    root="pixio",
    outer_norms=("layernorm",),
    extra_tokens=0,
    extra_token_fields=("n_cls_tokens",),
    config_head_dim=True,
    convolutions=True,
    # transformers adds and takes away a base model's prefix, and so loads one of the two norms for the other
    twin_attributes={"PixioBackbone": {"base_model_prefix": ""}},
)
#: patches through a Linear, no norm behind the last layer
RADIO = replace(
    DINOV2,
    model_type="radio",
    root="radio",
    patch="embeddings.patch_projection",
    norms=(),
    extra_tokens=0,
    extra_token_fields=("num_cls_tokens", "num_registers"),
    ignored_inputs=("cu_seqlens",),  # of packed images
)
RF_DETR_DINOV2 = RfDetrFamily(
    **_NAMES,
    model_type="rf_detr_dinov2",
    root="rf_detr_dinov2",
    config_head_dim=True,
    tiny={"patch_size": 4, "num_windows": 2},
)
VITPOSE_BACKBONE = VitPoseFamily(
    model_type="vitpose_backbone",
    root="vit",
    layers="encoder.layer",
    attention="attention.attention",
    q="query",
    k="key",
    v="value",
    outer_o="attention.output.dense",
    extra_tokens=0,
)
