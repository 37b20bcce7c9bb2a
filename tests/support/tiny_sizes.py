"""Fields of tiny configs."""

from __future__ import annotations

from typing import Any

SIZE = 16
LABELS = 5
#: what every columnar family has; 4 heads of 8, 2 x 2 patches
PLAIN: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": SIZE,
    "patch_size": 8,
}
WITH_MLP: dict[str, Any] = {**PLAIN, "intermediate_size": 48}
DINO: dict[str, Any] = {**PLAIN, "mlp_ratio": 2}
#: 2 x 2 patches where they are not padded
NAFLEX: dict[str, Any] = {**{k: v for k, v in WITH_MLP.items() if k != "image_size"}, "num_patches": 4}
#: half of the patches is seen
MAE: dict[str, Any] = {
    **WITH_MLP,
    "mask_ratio": 0.5,
    "decoder_num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 24,
}
VIDEO: dict[str, Any] = {**{k: v for k, v in MAE.items() if k != "mask_ratio"}, "num_frames": 4}
BEIT: dict[str, Any] = {**WITH_MLP, "use_relative_position_bias": True, "drop_path_rate": 0.0}
SWIN: dict[str, Any] = {
    "embed_dim": 16,
    "depths": [2, 3],
    "num_heads": [2, 4],
    "window_size": 2,
    "image_size": SIZE,
    "patch_size": 2,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
#: a text tower of the size of the others
WORDS: dict[str, Any] = {
    **{k: v for k, v in WITH_MLP.items() if k not in ("image_size", "patch_size")},
    "vocab_size": 50,
    "bos_token_id": 1,
    "eos_token_id": 49,
    "pad_token_id": 0,
    "max_position_embeddings": 7,
    "projection_dim": 24,
}
#: five layers, of which four enter a feature pyramid; 4 x 4 patches
SEGMENTS: dict[str, Any] = {
    **BEIT,
    "num_hidden_layers": 5,
    "patch_size": 4,
    "out_indices": [1, 2, 3, 4],
    "pool_scales": [1, 2],
    "auxiliary_channels": 8,
}
STAGES = {"out_features": ["stage1", "stage3"]}
