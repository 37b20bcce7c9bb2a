"""The architectures that SPViT's authors published (arXiv 2111.11802), as far as they did layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, SwinConfig, ViTConfig

from hf_vitprune import Architecture

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published_spvit.json").read_text())
#: the dense models of the published shapes, as their configs on the Hub say
DENSE: dict[str, PreTrainedConfig] = {
    "SPViT-DeiT-Ti": ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=1000),
    "SPViT-DeiT-B": ViTConfig(num_labels=1000),
    "SPViT-Swin-Ti": SwinConfig(num_labels=1000),
}


def published(name: str) -> Architecture:
    """A published shape of SPViT (arXiv 2111.11802); its convolutions have the channels of one head."""

    def layers(mixers: Any, hidden: Any) -> Any:
        if isinstance(mixers, list):
            return [layers(*pair) for pair in zip(mixers, hidden, strict=True)]
        return {"mixer": mixers, "mlp": hidden}

    return Architecture.from_layers(DENSE[name], layers(PUBLISHED[name]["mixer"], PUBLISHED[name]["mlp_hidden"]))
