"""InternVL's vision tower: LayerNorms or RMSNorms, bare LayerScale factors, queries and keys normed over all heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from ..utils.modules import resize_tensor
from .base import Family


@dataclass(frozen=True)
class InternVLFamily(Family):
    def refused_units(self, config: PreTrainedConfig) -> dict[str, str]:
        if not config.use_qk_norm:
            return {}
        return dict.fromkeys(("qk", "heads"), "a norm runs over the queries of all heads together (use_qk_norm)")

    def has_plain_qk(self, config: PreTrainedConfig) -> bool:
        return not config.use_qk_norm

    def refused_sizes(self, config: PreTrainedConfig, layers: Sequence[Any]) -> str | None:
        dense, normed = self.dense_layers(config)[0], self.refused_units(config).get("qk")
        for i, shape in enumerate(layers):
            whole = (shape.heads, shape.qk_dim) == (dense.heads, dense.head_dim)
            if normed and shape.mixer == "attention" and not whole:
                return (
                    f"layer {i}: {normed}, whose {dense.heads} heads of {dense.head_dim} channels all stay; got "
                    f"{shape.heads} of {shape.qk_dim}"
                )
        return super().refused_sizes(config, layers)

    def configure_layer(self, layer: nn.Module, config: PreTrainedConfig, shifted: bool | None) -> None:
        """The norms of queries and keys keep the dense width, whatever the residual stream has."""
        if config.use_qk_norm:
            attention: Any = layer.attention
            for norm in self.qk_norms if hasattr(attention, self.qk_norms[0]) else ():
                resize_tensor(attention, f"{norm}.weight", (config.hidden_size,))


INTERNVL_VISION = InternVLFamily(
    model_type="internvl_vision",
    root="internvl_vision",
    layers="encoder.layer",
    o="projection_layer",
    scale1="lambda_1",
    scale2="lambda_2",
    qk_norms=("q_norm", "k_norm"),
    interpolates=False,  # they always do
)
