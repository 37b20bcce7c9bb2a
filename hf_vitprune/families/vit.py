"""ViT and its closest relatives: DeiT, ViT-MSN, I-JEPA and the encoder of ViT-MAE, whose decoder stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..utils.mixing import InPlaceMixin, mix_into
from .base import Family
from .parts import Grid


@dataclass(frozen=True)
class ViTFamily(Family):
    """Special tokens, a final LayerNorm; the stock config honours ``head_dim``."""

    config_head_dim: bool = True
    convolutions: bool = True


class AnyWidthMixin(InPlaceMixin):
    """Embeddings whose fixed positions come from a checkpoint: stock code makes them for multiples of four only."""

    def initialize_weights(self) -> None:
        """Positions are left for the checkpoint to fill in."""


@dataclass(frozen=True)
class ViTMAEFamily(ViTFamily):
    """Layers see the CLS token and a random part of the patches, which are no grid."""

    config_head_dim: bool = False  # stock code would give it to the decoder, too
    convolutions: bool = False

    def attention_tokens(self, config: Any, grid: Grid, kind: int) -> tuple[int, int, int]:
        n = int(grid[0] * grid[1] * (1 - config.mask_ratio)) + self.extra_tokens
        return n, n, n * n

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        if kept != width:
            mix_into(self.encoder(model).embeddings, AnyWidthMixin)

    def batches(self, config: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """With the random numbers that decide which patches are seen, where the batch has none: always the same."""
        if "noise" in batch:
            return [batch]
        rows, columns = self.grid(config, tuple(batch["pixel_values"].shape[-2:]))
        generator = torch.Generator().manual_seed(0)
        return [{**batch, "noise": torch.rand(len(batch["pixel_values"]), rows * columns, generator=generator)}]

    def inputs(self, config: Any, size: Any = None, device: Any = "cpu", task: str = "Model") -> dict[str, Any]:
        rows, columns = self.grid(config, size)
        noise = torch.rand(1, rows * columns, device=device)
        return {**super().inputs(config, size, device, task), "noise": noise}


VIT = ViTFamily(model_type="vit", root="vit")
#: a second special token, for distillation; the WithTeacher class has a classifier on each of the two
DEIT = ViTFamily(model_type="deit", root="deit", extra_tokens=2)
VIT_MSN = ViTFamily(model_type="vit_msn", root="vit")
IJEPA = ViTFamily(model_type="ijepa", root="ijepa", extra_tokens=0)
VIT_MAE = ViTMAEFamily(
    model_type="vit_mae",
    root="vit",
    reads="images whose patches it masks at random",
    tiny={"mask_ratio": 0.5},
)
