"""Points of a model where the channels of units pass and can be multiplied, by gates or masks; one table of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..families import LayerPaths
from ..modeling.norms import norm_over
from ..modeling.structure import get_wrapped, layer_paths
from ..spec.architecture import Architecture
from ..spec.units import LAYER_UNITS, channels_of
from ..utils.hooks import GateHook
from ..utils.modules import unwrapped
from .gates import DepthGate, FoldedGate, UnitMask
from .masked import residual_norms


class Point(NamedTuple):
    """A point of a layer.

    Attributes:
        unit: what a plan calls the channels that pass here.
        writer: path of the module that puts the channels out; None where ``reader`` is hooked.
        reader: path of the module that takes them in.
    """

    unit: str
    writer: Callable[[LayerPaths], str] | None
    reader: Callable[[LayerPaths], str]

    @property
    def mixes(self) -> bool:
        """Whether the point is in the attention of a layer, not in its MLP."""
        return not self.unit.startswith("mlp")


#: the table of units knows tensors; this is where activations pass, bottom to top. A q/k channel is off when its query
#: is zero, a head or v channel when the output projection reads 0
POINTS = {
    "attention_in": Point("attention_in", lambda p: p.norm1, lambda p: p.attention),
    "queries": Point("qk", lambda p: p.q, lambda p: p.q),
    "attention_out": Point("v", None, lambda p: p.o),
    "mlp_in": Point("mlp_in", lambda p: p.norm2, lambda p: p.mlp),
    "mlp_hidden": Point("mlp", None, lambda p: p.fc2),
}
#: name of the factors of the residual channels
EMBEDDING = "embedding"


def point_name(layer: int, point: str) -> str:
    """Name of a point of a layer in a ModuleDict (which allows no dots)."""
    return f"layer{layer}_{point}"


def point_sizes(architecture: Architecture, layer: int) -> dict[str, int]:
    """Channels at every point of a layer; points of removed branches are absent."""
    shape, width = architecture.layers[layer], architecture.width(layer)
    there = {True: shape.mixer == "attention", False: bool(shape.mlp)}
    return {name: channels_of(shape, point.unit, width) for name, point in POINTS.items() if there[point.mixes]}


def make_masks(architecture: Architecture, embedding: bool, device: torch.device) -> nn.ModuleDict:
    """A mask for the units of every layer, and one of the residual channels if ``embedding``."""
    masks = nn.ModuleDict()
    if embedding:
        masks[EMBEDDING] = UnitMask(architecture.hidden_size, device)
    for i in range(len(architecture.layers)):
        for name, size in point_sizes(architecture, i).items():
            if POINTS[name].unit in LAYER_UNITS:
                masks[point_name(i, name)] = UnitMask(size, device)
    return masks


def attach(model: PreTrainedModel, architecture: Architecture, factors: nn.ModuleDict) -> list[RemovableHandle]:
    """Hook gates or masks, by the names of their points, into a model (its Linears possibly wrapped by PEFT).

    A residual channel is off when no norm over the stream sees it; what else reads the stream (CLIP's classifier)
    reads it behind the last layer.

    Returns:
        Handles; removing them all leaves the model as it was.
    """
    handles: list[Any] = []
    for i, paths in enumerate(layer_paths(model, architecture)):
        for name, point in POINTS.items():
            if point_name(i, name) not in factors:
                continue
            factor, reader = factors[point_name(i, name)], get_wrapped(model, point.reader(paths))
            inputs = point.unit not in LAYER_UNITS
            before = point.writer is None or (inputs and architecture.family.post_norm)
            module = reader if before or point.writer is None else get_wrapped(model, point.writer(paths))
            channels = unwrapped(reader) if inputs else None
            folded = FoldedGate.of(module, factor, nn.Linear if before else nn.LayerNorm)
            if folded is not None and getattr(channels, "input_index", None) is None:
                handles.append(folded.attach())
            elif before:
                handles.append(module.register_forward_pre_hook(Before(factor)))
            else:
                handles.append(module.register_forward_hook(After(factor, channels)))
    if EMBEDDING in factors:
        mask = factors[EMBEDDING]
        handles += [norm.register_forward_hook(_OverKept(mask)) for norm in residual_norms(model, architecture)]
        handles.append(get_wrapped(model, paths.layer).register_forward_hook(_Stream(mask)))
        entries = [get_wrapped(model, path) for path in architecture.family.neck(model)]
        handles += [entry.register_forward_pre_hook(_Maps(mask)) for entry in entries]
    return handles


def attach_depth_gate(model: PreTrainedModel, architecture: Architecture, gate: DepthGate) -> list[RemovableHandle]:
    """Make every layer that takes no part hand on its input.

    Returns:
        Handles; removing them all leaves the model as it was.
    """
    layers = [model.get_submodule(paths.layer) for paths in layer_paths(model, architecture)]
    return [layer.register_forward_hook(_Skipped(gate, i), with_kwargs=True) for i, layer in enumerate(layers)]


class Before(GateHook):
    """Multiplies what goes into a module."""

    def __init__(self, gate: nn.Module) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.gate(args[0]), *args[1:])


class After(GateHook):
    """Multiplies what comes out of a module: of a model that was pruned before, the channels that ``reader`` reads."""

    def __init__(self, gate: nn.Module, reader: nn.Module | None) -> None:
        self.gate, self.reader = gate, reader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        index = getattr(self.reader, "input_index", None)
        if index is None:
            return self.gate(output)
        return output.index_copy(-1, index, self.gate(output.index_select(-1, index)).to(output.dtype))


class _Skipped(GateHook):
    """Replaces what comes out of a layer that takes no part by what went in; its parameters get gradients of zero."""

    def __init__(self, gate: DepthGate, layer: int) -> None:
        self.gate, self.layer = gate, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.gate.decided:
            return output
        hidden = args[0] if args else kwargs["hidden_states"]
        # chosen on the device: reading the flag here would make the host wait for it in every layer
        if isinstance(output, tuple):
            return (torch.where(self.gate.kept[self.layer], output[0], hidden), *output[1:])
        return torch.where(self.gate.kept[self.layer], output, hidden)


class _Stream(GateHook):
    """Masks the residual stream behind a layer."""

    def __init__(self, mask: nn.Module) -> None:
        self.mask = mask

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (self.mask(output[0]), *output[1:])
        return self.mask(output)


class _Maps(GateHook):
    """Masks the maps of features that enter a neck."""

    def __init__(self, mask: nn.Module) -> None:
        self.mask: Any = mask

    def __call__(self, entry: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.mask.active:
            return None
        kept, maps = self.mask.mask[:, None, None], args[0]
        if isinstance(maps, torch.Tensor):
            return (maps * kept.to(maps.dtype), *args[1:])
        return (tuple(one * kept.to(one.dtype) for one in maps), *args[1:])


class _OverKept(GateHook):
    """Replaces what a norm puts out by that of one over the kept channels only."""

    def __init__(self, mask: nn.Module) -> None:
        self.mask: Any = mask

    def __call__(self, norm: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self.mask.active:
            return None
        return norm_over(norm, args[0], self.mask.mask, self.mask.kept).to(output.dtype)
