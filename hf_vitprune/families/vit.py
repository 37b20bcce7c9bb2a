"""ViT: one CLS token, q/k/v/o and fc1/fc2, `head_dim` honoured by the stock config."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from .base import Family, Part


@dataclass(frozen=True)
class ViTFamily(Family):
    """ViT and its close relatives: special tokens, a final LayerNorm, then pooler, classifier or pixel decoder."""

    config_head_dim: bool = True
    convolutions: bool = True
    #: token of the base model that gets a pooler; DeiT's task models share the layout
    pooled_tasks: tuple[str, ...] = ("Model",)

    def outer_parts(self, config: PreTrainedConfig, width: int, task: str, grid: tuple[int, int]) -> list[Part]:
        tokens = self.extra_tokens_of(config)
        parts = [
            self.patch_part(config, width, grid),
            self.table_part("tokens", tokens + (task == "ForMaskedImageModeling"), width),
            self.table_part("positions", self.positions(config) + tokens, width),
            self.table_part("final norm", 2, width),
        ]
        if task in self.pooled_tasks:
            parts.append(self.linear_part("pooler", width, config.pooler_output_size))
        elif task == "ForMaskedImageModeling":
            pixels = config.encoder_stride**2 * config.num_channels
            parts.append(self.linear_part("decoder", width, pixels, tokens=grid[0] * grid[1]))
        elif task == "ForImageClassificationWithTeacher":
            parts.append(self.linear_part("classifier", width, 2 * self.labels(config)))
        elif self.labels(config):
            parts.append(self.linear_part("classifier", width, self.labels(config)))
        return parts


VIT = ViTFamily(model_type="vit", root="vit")

__all__ = ["VIT", "ViTFamily"]
