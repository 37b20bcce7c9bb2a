"""InternVL's vision tower: LayerNorms or RMSNorms, bare LayerScale factors, queries and keys normed over all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..utils.modules import resize_tensor
from .base import Family


@dataclass(frozen=True)
class InternVLFamily(Family):
    def refused_units(self, config: Any) -> dict[str, str]:
        if not config.use_qk_norm:
            return {}
        return dict.fromkeys(("qk", "heads"), "a norm runs over the queries of all heads together (use_qk_norm)")

    def has_plain_qk(self, config: Any) -> bool:
        return not config.use_qk_norm

    def refused_attention(self, config: Any, shape: Any) -> str | None:
        normed = self.refused_units(config).get("qk")
        dense = self.dense_layers(config)[0] if normed else None
        if dense is None or (shape.heads, shape.qk_dim) == (dense.heads, dense.head_dim):
            return None
        return (
            f"{normed}, whose {dense.heads} heads of {dense.head_dim} channels all stay; got {shape.heads} of "
            f"{shape.qk_dim}"
        )

    def configure_layer(self, layer: nn.Module, config: Any, shifted: bool | None) -> None:
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
