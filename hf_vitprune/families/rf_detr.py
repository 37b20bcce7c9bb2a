"""RF-DETR's backbone: DINOv2 whose patches stay in windows, each with the CLS token; some layers attend to all."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .dinov2 import Dinov2Family


@dataclass(frozen=True)
class RfDetrFamily(Dinov2Family):
    """A layer attends to one window or to all by its number (``window_block_indexes``), which follows from the config.

    Stock code finds these numbers anew from ``out_features`` whenever it reads a config, so no layer can go.
    """

    def refused_units(self, config: PreTrainedConfig) -> dict[str, str]:
        if config.num_windows == 1:
            return {}
        return {"layers": "a layer's number says whether it attends to one window or to all (out_features)"}

    def kinds(self, config: PreTrainedConfig, stages: list[int]) -> list[int]:
        """1 for layers that attend to all windows."""
        if config.num_windows == 1:
            return stages
        return [int(i not in config.window_block_indexes) for i in range(len(stages))]

    def sequences(self, config: PreTrainedConfig) -> int:
        return config.num_windows**2

    def attention_tokens(self, config: PreTrainedConfig, grid: tuple[int, int], kind: int) -> tuple[int, int, int]:
        windows = config.num_windows**2
        tokens = grid[0] * grid[1] + windows  # each window has the CLS token
        return tokens, tokens, tokens**2 if kind else tokens**2 // windows


RF_DETR_DINOV2 = RfDetrFamily(
    model_type="rf_detr_dinov2",
    root="rf_detr_dinov2",
    layers="encoder.layer",
    norm1="norm1",
    norm2="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
    config_head_dim=True,
    interpolates=False,  # they always do
    tiny={"patch_size": 4, "num_windows": 2},
)
