"""DINOv2 and DINOv2 with registers: LayerScale, optional SwiGLU, a classifier on CLS and mean patch side by side."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig

from .base import Family

#: largest whole mlp_ratio that is tried; published models have 4
MAX_MLP_RATIO = 64


def is_gated(config: PreTrainedConfig) -> bool:
    """Whether the MLPs are SwiGLU ones."""
    return bool(getattr(config, "use_swiglu_ffn", False))


def follow_stages(config: Any, num_layers: int) -> None:
    """A backbone's config lists its stages, one a layer; they must follow the depth."""
    config.stage_names = ["stem"] + [f"stage{i}" for i in range(1, num_layers + 1)]
    kept = [name for name in config.out_features if name in config.stage_names]
    config.set_output_features_output_indices(out_features=kept or config.stage_names[-1:], out_indices=None)


@dataclass(frozen=True)
class Dinov2Family(Family):
    def mlp_size(self, c: PreTrainedConfig) -> int:
        hidden = int(c.hidden_size * c.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if is_gated(c) else hidden

    def fc1_names(self, config: PreTrainedConfig) -> tuple[str, ...]:
        return ("gate_proj", "up_proj") if is_gated(config) else ("fc1",)

    def fc2_name(self, config: PreTrainedConfig) -> str:
        return "down_proj" if is_gated(config) else "fc2"

    def resize_config(
        self, config: PreTrainedConfig, hidden_size: int, num_layers: int, depths: tuple[int, ...] | None
    ) -> None:
        super().resize_config(config, hidden_size, num_layers, depths)
        if hasattr(config, "stage_names"):
            follow_stages(config, num_layers)

    def uniform_config(
        self, config: PreTrainedConfig, heads: int, head_dim: int, mlp: int, hidden_size: int
    ) -> dict[str, Any]:
        wide = copy.copy(config)
        wide.hidden_size = hidden_size
        for ratio in range(1, MAX_MLP_RATIO + 1):
            wide.mlp_ratio = type(config.mlp_ratio)(ratio)
            if self.mlp_size(wide) == mlp:
                return {"num_attention_heads": heads, "head_dim": head_dim, "mlp_ratio": wide.mlp_ratio}
        raise ValueError(
            f"stock {self.model_type} configs hold a whole mlp_ratio, and none makes an MLP of {mlp} at width "
            f"{hidden_size}"
        )

    def extra_tokens_of(self, config: PreTrainedConfig) -> int:
        return 1 + getattr(config, "num_register_tokens", 0)


DINOV2 = Dinov2Family(
    model_type="dinov2",
    root="dinov2",
    layers="encoder.layer",
    norm1="norm1",
    norm2="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
    config_head_dim=True,
    convolutions=True,
    interpolates=False,  # they always do
)
DINOV2_WITH_REGISTERS = replace(DINOV2, model_type="dinov2_with_registers", root="dinov2_with_registers")
