"""ViTPose's backbone: nested attention as VideoMAE's, ViT's MLP, images of one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..errors import UnsupportedModelError
from .base import LayerPaths, LayerSizes
from .dinov2 import Dinov2Family


@dataclass(frozen=True)
class VitPoseFamily(Dinov2Family):
    def dense_layers(self, config: PreTrainedConfig) -> list[LayerSizes]:
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

    def layer_paths(self, prefix: str, layer: str, config: PreTrainedConfig) -> LayerPaths:
        paths = super().layer_paths(prefix, layer, config)
        return paths._replace(o=f"{prefix}{layer}.attention.output.dense")

    @property
    def output_name(self) -> str | None:
        return None

    def uniform_config(
        self, config: PreTrainedConfig, heads: int, head_dim: int, mlp: int, hidden_size: int
    ) -> dict[str, Any]:
        if heads * head_dim != hidden_size:
            raise ValueError(
                f"stock {self.model_type} models have head_dim = hidden_size / heads, here {heads} heads of "
                f"{head_dim} at width {hidden_size}"
            )
        fields = super().uniform_config(config, heads, head_dim, mlp, hidden_size)
        del fields["head_dim"]
        return fields

    def extra_tokens_of(self, config: PreTrainedConfig) -> int:
        return 0

    def fixed_size(self, config: PreTrainedConfig, task: str) -> bool:
        return True


VITPOSE_BACKBONE = VitPoseFamily(
    model_type="vitpose_backbone",
    root="vit",
    layers="encoder.layer",
    attention="attention.attention",
    q="query",
    k="key",
    v="value",
    interpolates=False,
)
