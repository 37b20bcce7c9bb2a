"""AIMv2's vision tower: RMSNorms, gated MLPs, Linears without biases, positions learned or (native) computed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..utils.mixing import InPlaceMixin, mix_into
from .pooling import PoolingFamily


class KeptGridPositionsMixin(InPlaceMixin):
    """Embeddings of a narrowed native tower: positions are computed for the dense width, and the kept ones taken."""

    def narrow(self, width: int, kept: int) -> None:
        self.full_width = width
        index = torch.arange(kept, device="meta")
        self.register_buffer("input_index", index)  # type: ignore[attr-defined]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        module: Any = self
        patches = module.patch_embed(pixel_values)
        rows, columns = patches.shape[-2:]
        tokens = module.rms_norm(patches.flatten(2).transpose(1, 2))
        make = sys.modules[self.stock_class.__module__].build_2d_sinusoidal_position_embedding
        table = make(rows, columns, self.full_width, device=tokens.device, dtype=tokens.dtype)
        table = table.roll(self.full_width // 2, -1)  # the model's halves are the other way round
        return tokens + table.index_select(-1, module.input_index)


@dataclass(frozen=True)
class Aimv2Family(PoolingFamily):
    head_field: str = "use_head"

    def fixed_size(self, config: PreTrainedConfig, task: str) -> bool:
        return not config.is_native

    def finish_structure(self, model: nn.Module, config: PreTrainedConfig, dense_hidden_size: int) -> None:
        super().finish_structure(model, config, dense_hidden_size)
        self._narrow_positions(model, dense_hidden_size, config.hidden_size)

    def narrow_stream(self, model: nn.Module, width: int, kept: int) -> None:
        super().narrow_stream(model, width, kept)
        self._narrow_positions(model, width, kept)

    def _narrow_positions(self, model: Any, width: int, kept: int) -> None:
        embeddings = model.embeddings
        if not model.config.is_native or kept == width:
            return
        if isinstance(embeddings, KeptGridPositionsMixin):  # it was narrowed before
            width = embeddings.full_width
        mix_into(embeddings, KeptGridPositionsMixin)
        embeddings.narrow(width, kept)


AIMV2_VISION = Aimv2Family(
    model_type="aimv2_vision_model",
    root="vision_model",
    layers="encoder.layers",
    patch="embeddings.patch_embed",
    norm1="rms_norm1",
    norm2="rms_norm2",
    o="out_proj",
    mlp="ffn",
    fc1=("gate_proj", "up_proj"),
    fc2="down_proj",
    norms=("embeddings.rms_norm", "rms_norm"),
    extra_tokens=0,
    convolutions=True,
    interpolates=False,
)
