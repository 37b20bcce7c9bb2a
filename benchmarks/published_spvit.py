"""The architectures that SPViT's authors published (arXiv 2111.11802, repository ziplab/SPViT), counted.

python -m benchmarks.published_spvit    # parameters, multiply-adds, and what was pruned of attention and of MLPs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig, SwinConfig, ViTConfig

from hf_vitprune import Architecture, count
from hf_vitprune.cost.closed_form import removed_macs

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published_spvit.json").read_text())
_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
_DEEP = {"depths": [2, 2, 18, 2], "num_labels": 1000}
#: the dense models of the published shapes, as their configs on the Hub say
DENSE: dict[str, PreTrainedConfig] = {
    "SPViT-DeiT-Ti": ViTConfig(**_TINY, num_labels=1000),
    "SPViT-DeiT-S": ViTConfig(**_SMALL, num_labels=1000),
    "SPViT-DeiT-B": ViTConfig(num_labels=1000),
    "SPViT-DeiT-B-10G": ViTConfig(num_labels=1000),
    "SPViT-Swin-Ti": SwinConfig(num_labels=1000),
    "SPViT-Swin-S": SwinConfig(**_DEEP),
    "SPViT-Swin-B": SwinConfig(**_DEEP, embed_dim=128, num_heads=[4, 8, 16, 32]),
}


def published(name: str) -> Architecture:
    """A published shape of SPViT (arXiv 2111.11802); its convolutions have the channels of one head."""

    def layers(mixers: Any, hidden: Any) -> Any:
        if isinstance(mixers, list):
            return [layers(*pair) for pair in zip(mixers, hidden, strict=True)]
        return {"mixer": mixers, "mlp": hidden}

    return Architecture.from_layers(DENSE[name], layers(PUBLISHED[name]["mixer"], PUBLISHED[name]["mlp_hidden"]))


def unfolded_params(architecture: Architecture) -> int:
    """Parameters where a convolution is still made of all heads' value and output weights, as the paper counts.

    The mixing table and both BatchNorms come on top of d x d weights twice; what is stored folded goes off.
    """
    total = count(architecture).params
    dense = Architecture.dense(architecture.config)
    for i, shape in enumerate(architecture.layers):
        if shape.kernel:
            d, c = architecture.width(i), shape.conv_channels or 0
            total += 2 * d * (d + 1) + 9 * dense.layers[i].heads + 2 * 2 * c
            total -= d * c * (shape.kernel**2 + 1) + d + 2 * c
    return total


def main() -> None:
    """Print a row for every published architecture."""
    columns = ("", "folded", "unfolded", "MACs", "of dense", "attention gone", "MLP gone", "attention's part")
    table = Table(*columns)
    for name in PUBLISHED:
        architecture = published(name)
        cost, dense = count(architecture), count(Architecture.dense(DENSE[name]))
        gone = removed_macs(architecture)
        table.add_row(
            name,
            f"{cost.params / 1e6:.2f}M",
            f"{unfolded_params(architecture) / 1e6:.2f}M",
            f"{cost.macs / 1e9:.3f}G",
            f"{cost.macs / dense.macs:.1%}",
            *(f"{share:.1%}" for share in gone.values()),
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
