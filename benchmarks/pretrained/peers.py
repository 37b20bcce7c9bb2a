"""Torch-Pruning on the tower: its magnitude pruner, by its own graph of dependencies."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_vitprune.utils.extras import need


def torch_pruning(model: Any, pixels: torch.Tensor, share: float = 0.5) -> Any:
    """A copy with this share of the channels of heads and of the hidden neurons removed by ``torch_pruning``.

    The residual stream stays, so that features can be compared; so do the heads, as many as they are. The package
    narrows Linears and leaves the attention's ``head_dim``, with which transformers would cut the channels into fewer
    heads, without an error: it is set here.
    """
    need("peers", "torch_pruning")
    import torch_pruning as tp

    small = copy.deepcopy(model)
    named = dict(small.named_modules())
    projections = ("q_proj", "k_proj", "v_proj")
    heads = {one: small.config.num_attention_heads for name, one in named.items() if name.endswith(projections)}
    residual = [one for name, one in named.items() if name.endswith(("o_proj", "fc2", "projection"))]
    pruner = tp.pruner.MagnitudePruner(
        small,
        {"pixel_values": pixels},
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        num_heads=heads,
        ignored_layers=residual,
        output_transform=lambda output: output.last_hidden_state,
    )
    pruner.step()
    for layer in small.encoder.layer:
        attention = layer.attention
        attention.head_dim = attention.q_proj.out_features // small.config.num_attention_heads
    return small


def cost_ratio(small: Any, model: Any, pixels: torch.Tensor) -> float:
    """Share of the MACs of a forward pass, as torch counts them."""
    counts = []
    for one in (small, model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(pixel_values=pixels)
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]
