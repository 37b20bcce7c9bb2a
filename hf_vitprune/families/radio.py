"""RADIO: DINOv2's layers, patches through a Linear, no norm behind the last layer."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .dinov2 import Dinov2Family


@dataclass(frozen=True)
class RadioFamily(Dinov2Family):
    def extra_tokens_of(self, config: PreTrainedConfig) -> int:
        return config.num_cls_tokens + config.num_registers


RADIO = RadioFamily(
    model_type="radio",
    root="radio",
    layers="encoder.layer",
    patch="embeddings.patch_projection",
    norm1="norm1",
    norm2="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
    norms=(),
    ignored_inputs=("cu_seqlens",),  # of packed images
    config_head_dim=True,
    convolutions=True,
    interpolates=False,
)
