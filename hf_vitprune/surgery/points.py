"""Points of a model where the channels of units pass and can be multiplied, by gates or masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..families import Family, LayerPaths
from ..modeling.outer import norm_over
from ..modeling.structure import layer_paths
from ..spec.architecture import Architecture
from ..spec.units import LAYER_UNITS, Axis, channels_of, layer_axes, units_in
from ..utils.hooks import GateHook
from ..utils.modules import get_wrapped, unwrapped
from .gates import DepthGate, FoldedGate, UnitMask
from .masked import residual_norms

#: name of a point of a layer, in settings and checkpoints -> the units that pass there, bottom to top; a head is off
#: when all of its v channels are
POINTS = {
    "attention_in": "attention_in",
    "queries": "qk",
    "attention_out": "v",
    "mlp_in": "mlp_in",
    "mlp_hidden": "mlp",
}
#: name of the factors of the residual channels
EMBEDDING = "embedding"


def point_name(layer: int, point: str) -> str:
    """Name of a point of a layer in a ModuleDict (which allows no dots)."""
    return f"layer{layer}_{point}"


def point_sizes(architecture: Architecture, layer: int) -> dict[str, int]:
    """Channels at every point of a layer; points of removed branches are absent."""
    shape, width = architecture.layers[layer], architecture.width(layer)
    return {name: channels_of(shape, unit, width) for name, unit in POINTS.items() if unit in units_in(shape)}


def make_masks(architecture: Architecture, embedding: bool, device: torch.device) -> nn.ModuleDict:
    """A mask for the units of every layer, and one of the residual channels if ``embedding``."""
    masks = nn.ModuleDict()
    if embedding:
        masks[EMBEDDING] = UnitMask(architecture.hidden_size, device)
    for i in range(len(architecture.layers)):
        for name, size in point_sizes(architecture, i).items():
            if POINTS[name] in LAYER_UNITS:
                masks[point_name(i, name)] = UnitMask(size, device)
    return masks


def attach(model: PreTrainedModel, architecture: Architecture, factors: nn.ModuleDict) -> list[RemovableHandle]:
    """Hook gates or masks, by the names of their points, into a model (its Linears possibly wrapped by PEFT).

    A residual channel is off when no norm over the stream sees it; what else reads the stream (CLIP's classifier)
    reads it behind the last layer. Removing all handles that are returned leaves the model as it was.
    """
    handles: list[Any] = []
    for i, paths in enumerate(layer_paths(model, architecture)):
        axes = layer_axes(architecture, i, paths)
        for name, unit in POINTS.items():
            if point_name(i, name) in factors:
                factor = factors[point_name(i, name)]
                handles.append(_attach(model, architecture.family, paths, unit, axes[unit], factor))
    if EMBEDDING in factors:
        mask = factors[EMBEDDING]
        handles += [norm.register_forward_hook(_OverKept(mask)) for norm in residual_norms(model, architecture)]
        handles.append(get_wrapped(model, paths.layer).register_forward_hook(_Stream(mask)))
        entries = [get_wrapped(model, path) for path in architecture.family.neck(model)]
        handles += [entry.register_forward_pre_hook(_Maps(mask)) for entry in entries]
    return handles


def _attach(
    model: PreTrainedModel, family: Family, paths: LayerPaths, unit: str, axes: list[Axis], factor: nn.Module
) -> Any:
    """A factor in front of the one module that reads a unit, or behind what writes it; its handle.

    What several modules of a branch read is multiplied behind the norm, or in front of the branch where that has none.
    """
    readers = [axis.module for axis in axes if axis.axis == 1]
    branch = None
    if unit in LAYER_UNITS:
        before, path = bool(readers), (readers or [axes[0].module])[0]
    else:
        norm, entry = (paths.norm1, paths.attention) if unit == "attention_in" else (paths.norm2, paths.mlp)
        before, path = family.post_norm, entry if family.post_norm else norm
        branch = unwrapped(get_wrapped(model, entry))
    module = get_wrapped(model, path)
    folded = FoldedGate.of(module, factor, nn.Linear if before else nn.LayerNorm)
    if folded is not None and getattr(branch, "input_index", None) is None:
        return folded.attach()
    if before:
        return module.register_forward_pre_hook(Before(factor))
    return module.register_forward_hook(After(factor, branch))


def attach_depth_gate(model: PreTrainedModel, architecture: Architecture, gate: DepthGate) -> list[RemovableHandle]:
    """Make every layer that takes no part hand on its input, until the handles are removed."""
    layers = [model.get_submodule(paths.layer) for paths in layer_paths(model, architecture)]
    return [layer.register_forward_hook(_Skipped(gate, i), with_kwargs=True) for i, layer in enumerate(layers)]


class _FactorHook(GateHook):
    """A hook that multiplies by a gate or mask."""

    def __init__(self, factor: nn.Module) -> None:
        self.factor: Any = factor


class Before(_FactorHook):
    """Multiplies what goes into a module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.factor(args[0]), *args[1:])


class After(_FactorHook):
    """Multiplies what comes out of a module: of a model that was pruned before, the channels that ``reader`` reads."""

    def __init__(self, factor: nn.Module, reader: nn.Module | None) -> None:
        super().__init__(factor)
        self.reader = reader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        index = getattr(self.reader, "input_index", None)
        if index is None:
            return self.factor(output)
        return output.index_copy(-1, index, self.factor(output.index_select(-1, index)).to(output.dtype))


class _Skipped(_FactorHook):
    """Replaces what comes out of a layer that takes no part by what went in; its parameters get gradients of zero."""

    def __init__(self, gate: DepthGate, layer: int) -> None:
        super().__init__(gate)
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.factor.decided:
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        # chosen on the device: reading the flag here would make the host wait for it in every layer
        if isinstance(output, tuple):
            return (torch.where(self.factor.kept[self.layer], output[0], hidden), *output[1:])
        return torch.where(self.factor.kept[self.layer], output, hidden)


class _Stream(_FactorHook):
    """Masks the residual stream behind a layer."""

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (self.factor(output[0]), *output[1:]) if isinstance(output, tuple) else self.factor(output)


class _Maps(_FactorHook):
    """Masks the maps of features that enter a neck."""

    def __call__(self, entry: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.factor.active:
            return None
        kept, maps = self.factor.mask[:, None, None], args[0]
        if isinstance(maps, torch.Tensor):
            return (maps * kept.to(maps.dtype), *args[1:])
        return (tuple(one * kept.to(one.dtype) for one in maps), *args[1:])


class _OverKept(_FactorHook):
    """Replaces what a norm puts out by that of one over the kept channels only."""

    def __call__(self, norm: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self.factor.active:
            return None
        return norm_over(norm, args[0], self.factor.mask, self.factor.kept).to(output.dtype)
