"""Torch-Pruning on the tower: what becomes of its magnitude pruner, by its own graph of dependencies."""

from __future__ import annotations

import copy
from typing import Any

import torch


def torch_pruning(model: Any, pixels: torch.Tensor, share: float = 0.5) -> Any:
    """A copy with this share of all channels removed by ``torch_pruning``, heads staying as many as they are.

    Raises:
        Exception: whatever the package raises.
    """
    import torch_pruning as tp

    small = copy.deepcopy(model)
    heads = {
        module: small.config.num_attention_heads
        for name, module in small.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj"))
    }
    pruner = tp.pruner.MagnitudePruner(
        small,
        {"pixel_values": pixels},
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        num_heads=heads,
        output_transform=lambda output: output.last_hidden_state.sum(),
    )
    pruner.step()
    small(pixel_values=pixels)
    return small
