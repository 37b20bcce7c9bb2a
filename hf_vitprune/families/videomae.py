"""VideoMAE: ViT's layers over tubes of patches; output projections beside attention and MLP, keys without bias."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .base import Family
from .narrowed import NarrowedMixin, narrow_module
from .parts import NESTED, Grid


class KeptPositionsMixin(NarrowedMixin):
    """Embeddings of a narrowed model: the fixed positions are those of the dense width, and the kept ones taken."""

    def narrow(self, width: int, kept: int) -> None:
        super().narrow(width, kept)
        self.make_table()

    def make_table(self) -> None:
        """The positions of the dense width."""
        module: Any = self
        make = sys.modules[self.stock_class.__module__].get_sinusoid_encoding_table
        module.__dict__["position_embeddings"] = make(module.num_patches, module.full_width)

    @property
    def position_embeddings(self) -> torch.Tensor:
        """(1, patches, kept channels); the stock class keeps all of them in an attribute."""
        table = self.__dict__["position_embeddings"]
        return table.to(self.input_index.device).index_select(-1, self.input_index)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class VideoMAEFamily(Family):
    """Multiply-adds count every tube of patches: how many a pre-training model sees is not in its config."""

    def fixed_size(self, config: Any, task: str) -> bool:
        return True

    def head_norm(self, task: str) -> str | None:
        return None

    def attention_tokens(self, config: Any, grid: Grid, kind: int) -> tuple[int, int, int]:
        n = grid[0] * grid[1] * (config.num_frames // config.tubelet_size)
        return n, n, n * n

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        narrow_module(self.encoder(model).embeddings, KeptPositionsMixin, width, kept)

    def inputs(self, config: Any, size: Any = None, device: Any = "cpu", task: str = "Model") -> dict[str, Any]:
        image = super().inputs(config, size, device, task)["pixel_values"]
        frames = image[:, None].expand(-1, config.num_frames, -1, -1, -1).contiguous()
        if task != "ForPreTraining":
            return {"pixel_values": frames}
        tubes = self.attention_tokens(config, self.grid(config, size), 0)[0]
        hidden = torch.arange(tubes) >= tubes // 2
        return {"pixel_values": frames, "bool_masked_pos": hidden[None]}


VIDEOMAE = VideoMAEFamily(
    **NESTED,
    model_type="videomae",
    reads="frames of videos",
    pixel_axes=5,
    root="videomae",
    layers="encoder.layer",
    outer_norms=("fc_norm",),  # of the classifier
    extra_tokens=0,
    interpolates=False,
    tiny={"num_frames": 4},
)
