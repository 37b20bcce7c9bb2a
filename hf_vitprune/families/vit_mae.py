"""ViT-MAE: ViT's layers over the CLS token and a random part of the patches, which are no grid; its decoder stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..utils.mixing import InPlaceMixin, mix_into
from .vit import ViTFamily


class AnyWidthMixin(InPlaceMixin):
    """Embeddings whose fixed positions come from a checkpoint: stock code makes them for multiples of four only."""

    def initialize_weights(self) -> None:
        """Positions are left for the checkpoint to fill in."""


@dataclass(frozen=True)
class ViTMAEFamily(ViTFamily):
    config_head_dim: bool = False  # stock code would give it to the decoder, too
    convolutions: bool = False

    def attention_tokens(self, config: PreTrainedConfig, grid: tuple[int, int], kind: int) -> tuple[int, int, int]:
        n = int(grid[0] * grid[1] * (1 - config.mask_ratio)) + self.extra_tokens
        return n, n, n * n

    def finish_structure(self, model: nn.Module, config: PreTrainedConfig, dense_hidden_size: int) -> None:
        if config.hidden_size != dense_hidden_size:
            self.narrow_stream(model, dense_hidden_size, config.hidden_size)

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        encoder: Any = getattr(model, self.root, model)
        mix_into(encoder.embeddings, AnyWidthMixin)

    def batches(self, config: PreTrainedConfig, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """With the random numbers that decide which patches are seen, where the batch has none: always the same."""
        if "noise" in batch:
            return [batch]
        rows, columns = self.grid(config, tuple(batch["pixel_values"].shape[-2:]))
        generator = torch.Generator().manual_seed(0)
        return [{**batch, "noise": torch.rand(len(batch["pixel_values"]), rows * columns, generator=generator)}]

    def _inputs(self, config: Any, size: tuple[int, int] | None, device: Any, task: str) -> dict[str, Any]:
        rows, columns = self.grid(config, size)
        noise = torch.rand(1, rows * columns, device=device)
        return {**super()._inputs(config, size, device, task), "noise": noise}


VIT_MAE = ViTMAEFamily(
    model_type="vit_mae",
    root="vit",
    reads="images whose patches it masks at random",
    tiny={"mask_ratio": 0.5},
)
