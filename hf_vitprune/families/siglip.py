"""SigLIP's vision tower: no CLS token, an attention-pooling head that keeps its own full width."""

from __future__ import annotations

from dataclasses import replace

from .pooling import PoolingFamily

SIGLIP_VISION = PoolingFamily(
    model_type="siglip_vision_model",
    root="vision_model",
    layers="encoder.layers",
    patch="embeddings.patch_embedding",
    norm1="layer_norm1",
    norm2="layer_norm2",
    attention="self_attn",
    o="out_proj",
    norms=("post_layernorm",),
    extra_tokens=0,
    convolutions=True,
)
#: the same tower under ``SiglipConfig``, as AutoModelForImageClassification maps it
SIGLIP = replace(SIGLIP_VISION, model_type="siglip", sub_config="vision_config", refused_classes=("SiglipModel",))
