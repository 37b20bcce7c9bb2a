"""VideoMAE: ViT's layers over tubes of patches; output projections beside attention and MLP, keys without bias."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..utils.mixing import InPlaceMixin, mix_into
from .base import Family, LayerPaths


class KeptPositionsMixin(InPlaceMixin):
    """Embeddings of a narrowed model: the fixed positions are those of the dense width, and the kept ones taken."""

    full_width: int

    def narrow(self, width: int, kept: int) -> None:
        module: Any = self
        module.full_width = width
        module.register_buffer("input_index", torch.arange(kept, device="meta"))
        module.make_table()

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

    def layer_paths(self, prefix: str, layer: str, config: PreTrainedConfig) -> LayerPaths:
        base = prefix + layer
        paths = super().layer_paths(prefix, layer, config)
        return paths._replace(o=f"{base}.attention.output.dense", fc2=f"{base}.output.dense")

    @property
    def output_name(self) -> str | None:
        return None

    def stream_norms(self, model: nn.Module) -> list[str]:
        own = ["fc_norm"] if getattr(model, "fc_norm", None) is not None else []  # of the classifier
        return super().stream_norms(model) + own

    def fixed_size(self, config: PreTrainedConfig, task: str) -> bool:
        return True

    def head_norm(self, task: str) -> str | None:
        return None

    def attention_tokens(self, config: PreTrainedConfig, grid: tuple[int, int], kind: int) -> tuple[int, int, int]:
        n = grid[0] * grid[1] * (config.num_frames // config.tubelet_size)
        return n, n, n * n

    def finish_structure(self, model: nn.Module, config: PreTrainedConfig, dense_hidden_size: int) -> None:
        self.narrow_stream(model, dense_hidden_size, config.hidden_size)

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        encoder: Any = getattr(model, self.root, model)
        embeddings = encoder.embeddings
        if kept == width and not isinstance(embeddings, KeptPositionsMixin):
            return
        if isinstance(embeddings, KeptPositionsMixin):  # it was narrowed before
            width = embeddings.full_width
        mix_into(embeddings, KeptPositionsMixin)
        embeddings.narrow(width, kept)

    def _inputs(self, config: Any, size: tuple[int, int] | None, device: Any, task: str) -> dict[str, Any]:
        image = super()._inputs(config, size, device, task)["pixel_values"]
        frames = image[:, None].expand(-1, config.num_frames, -1, -1, -1).contiguous()
        if task != "ForPreTraining":
            return {"pixel_values": frames}
        tubes = self.attention_tokens(config, self.grid(config, size), 0)[0]
        hidden = torch.arange(tubes) >= tubes // 2
        return {"pixel_values": frames, "bool_masked_pos": hidden[None]}


VIDEOMAE = VideoMAEFamily(
    model_type="videomae",
    reads="frames of videos",
    pixel_axes=5,
    root="videomae",
    layers="encoder.layer",
    attention="attention.attention",
    q="query",
    k="key",
    v="value",
    mlp="intermediate",
    fc1=("dense",),
    extra_tokens=0,
    interpolates=False,
    tiny={"num_frames": 4},
)
