"""Units switched off in a running model, by hooks: it computes what it will compute once they are cut out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..modeling.norms import norm_over
from ..modeling.structure import get_wrapped, layer_paths
from ..spec.architecture import Architecture
from .gates import After, Before, GateHook
from .transplant import residual_norms

#: name of the mask of the residual channels
EMBEDDING = "embedding"
#: places of a layer where units are switched off: channels of the queries, what the output projection reads, neurons
PLACES = ("queries", "attention_out", "mlp_hidden")


class UnitMask(nn.Module):
    """A factor of 0 or 1 for every unit of a place; costs nothing while all are 1.

    The mask follows from what a method keeps in its own buffers, so checkpoints do not hold it.

    Attributes:
        mask: (units,).
    """

    mask: torch.Tensor

    def __init__(self, units: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(units, device=device), persistent=False)
        self.kept = units

    def set(self, alive: torch.Tensor) -> None:
        """Keep the units marked in ``alive`` (units,)."""
        self.mask.copy_(alive)
        self.kept = int(alive.sum())

    @property
    def active(self) -> bool:
        return self.kept < len(self.mask)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features * self.mask.to(features.dtype) if self.active else features


def make_masks(architecture: Architecture, embedding: bool, device: torch.device) -> nn.ModuleDict:
    """A mask for every place of every layer, and one of the residual channels if ``embedding``."""
    masks = nn.ModuleDict()
    if embedding:
        masks[EMBEDDING] = UnitMask(architecture.hidden_size, device)
    for i, shape in enumerate(architecture.layers):
        if shape.mixer == "attention":
            masks[mask_name(i, "queries")] = UnitMask(shape.heads * shape.qk_dim, device)
            masks[mask_name(i, "attention_out")] = UnitMask(shape.heads * shape.v_dim, device)
        if shape.mlp:
            masks[mask_name(i, "mlp_hidden")] = UnitMask(shape.mlp, device)
    return masks


def mask_name(layer: int, place: str) -> str:
    """Name of a mask in a ModuleDict (which allows no dots)."""
    return f"layer{layer}_{place}"


def attach_masks(model: PreTrainedModel, architecture: Architecture, masks: nn.ModuleDict) -> list[RemovableHandle]:
    """Hook masks into ``model`` (the transformers model, its Linears possibly wrapped by PEFT).

    A q/k channel is off when its query is zero, a head or v channel when the output projection reads zeros, and a
    residual channel when no LayerNorm over the stream sees it; what else reads the stream (CLIP's classifier) reads it
    behind the last layer.

    Returns:
        Handles; removing them all leaves the model as it was.
    """
    handles = []
    for i, paths in enumerate(layer_paths(model, architecture)):
        for place, path, kind in (
            ("queries", paths.q, After),
            ("attention_out", paths.o, Before),
            ("mlp_hidden", paths.fc2, Before),
        ):
            name = mask_name(i, place)
            if name not in masks:
                continue
            module = get_wrapped(model, path)
            if kind is Before:
                handles.append(module.register_forward_pre_hook(Before(masks[name])))
            else:
                handles.append(module.register_forward_hook(After(masks[name], module)))
    if EMBEDDING in masks:
        mask = masks[EMBEDDING]
        handles += [norm.register_forward_hook(_OverKept(mask)) for norm in residual_norms(model, architecture)]
        handles.append(get_wrapped(model, paths.layer).register_forward_hook(_Stream(mask)))
    return handles


class _Stream(GateHook):
    """Masks the residual stream behind a layer."""

    def __init__(self, mask: nn.Module) -> None:
        self.mask = mask

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.mask(output[0]), *output[1:])
        return self.mask(output)


class _OverKept(GateHook):
    """Replaces what a norm puts out by that of one over the kept channels only."""

    def __init__(self, mask: nn.Module) -> None:
        self.mask: Any = mask

    def __call__(self, norm: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self.mask.active:
            return None
        return norm_over(norm, args[0], self.mask.mask, self.mask.kept).to(output.dtype)
