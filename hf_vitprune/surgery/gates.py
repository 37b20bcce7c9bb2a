"""Learned scores and hard masks at points of a stock model: attached by hooks, removed without trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..modeling.structure import get_wrapped, layer_paths
from ..spec.architecture import Architecture

#: places of a layer where features can be multiplied by a gate, bottom to top
POINTS = ("attention_in", "attention_out", "mlp_in", "mlp_hidden")


class _GatedFeatures(torch.autograd.Function):
    """``features * gate`` that remembers its output only.

    The Linear behind the gate keeps that very tensor for its own backward pass, so gating costs no activation
    memory. The gate's gradient needs the input, which is output / gate: gates of zero are kept off zero by the
    smallest amount whose products do not vanish.
    """

    @staticmethod
    def forward(ctx: Any, features: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        floor = torch.finfo(features.dtype).tiny ** 0.5
        gate = torch.where(gate.abs() < floor, torch.full_like(gate, floor).copysign(gate), gate)
        out = features * gate
        ctx.save_for_backward(out, gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, gate = ctx.saved_tensors
        precise = torch.promote_types(out.dtype, torch.float32)
        by_gate = (grad * out).flatten(0, -2).sum(0, dtype=precise) / gate.to(precise)
        return grad * gate, by_gate.to(gate.dtype)


class Gate(nn.Module):
    """One factor for every unit of a set: a learned score, times a mask of ones until a decision is taken.

    Attributes:
        score: (units,) parameter, ones at the start.
        mask: (units,) buffer of zeros and ones.
    """

    mask: torch.Tensor

    def __init__(self, units: int, device: torch.device) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.ones(units, device=device))
        self.register_buffer("mask", torch.ones(units, device=device))
        self.decided = False
        self.binary = False

    def decide(self, kept: torch.Tensor, binary: bool = False) -> None:
        """Switch units off for good.

        Args:
            kept: (units,) booleans.
            binary: the others become exactly one, whatever their score.
        """
        self.mask.copy_(kept)
        self.decided, self.binary = True, binary

    def factors(self) -> torch.Tensor:
        """(units,) what features are multiplied by."""
        return self.mask if self.binary else self.score * self.mask

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        device = features.device.type
        if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
            # the Linear behind would do it: it then keeps this very tensor
            features = features.to(torch.get_autocast_dtype(device))
        if self.training and torch.is_grad_enabled() and not self.binary:
            gated = _GatedFeatures.apply(features, self.score.to(features.dtype))
            return gated * self.mask.to(features.dtype) if self.decided else gated
        return features * self.factors().to(features.dtype)

    def get_extra_state(self) -> torch.Tensor:
        """Whether a decision was taken, so that a resumed run knows (a tensor: safetensors holds nothing else)."""
        return torch.tensor([self.decided, self.binary])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.decided, self.binary = map(bool, state.tolist())


class DepthGate(nn.Module):
    """How many of a model's layers take part: all until a decision is taken, then the first so many.

    Attributes:
        kept: (layers,) buffer of booleans.
    """

    kept: torch.Tensor

    def __init__(self, layers: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(layers, dtype=torch.bool, device=device))
        self.decided = False

    @property
    def layers(self) -> int:
        """Number of layers that take part."""
        return int(self.kept.sum())

    def decide(self, layers: int) -> None:
        """Let only the first ``layers`` take part from here on."""
        self.kept.copy_(torch.arange(len(self.kept)) < layers)
        self.decided = True

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor([self.decided])

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.decided = bool(state.item())


def gate_name(layer: int, point: str) -> str:
    """Name of a gate in a ModuleDict (which allows no dots)."""
    return f"layer{layer}_{point}"


def gate_sizes(architecture: Architecture, layer: int) -> dict[str, int]:
    """Units at every point of a layer; points of removed branches are absent."""
    shape, width = architecture.layers[layer], architecture.width(layer)
    sizes = {}
    if shape.mixer == "attention":
        sizes["attention_in"] = shape.attention_in or width
        sizes["attention_out"] = shape.heads * shape.v_dim
    if shape.mlp:
        sizes["mlp_in"] = shape.mlp_in or width
        sizes["mlp_hidden"] = shape.mlp
    return sizes


def attach_gates(model: PreTrainedModel, architecture: Architecture, gates: nn.ModuleDict) -> list[RemovableHandle]:
    """Hook every gate into ``model`` (the transformers model, its Linears possibly wrapped by PEFT).

    Returns:
        Handles; removing them all leaves the model as it was.
    """
    handles = []
    for i, paths in enumerate(layer_paths(model, architecture)):
        places = {
            "attention_in": (paths.norm1, paths.attention),
            "attention_out": (paths.o, None),
            "mlp_in": (paths.norm2, paths.mlp),
            "mlp_hidden": (paths.fc2, None),
        }
        for point, (path, reader) in places.items():
            name = gate_name(i, point)
            if name not in gates:
                continue
            module = get_wrapped(model, path)
            if reader is not None and architecture.family.post_norm:
                module, reader = get_wrapped(model, reader), None
            if reader is None:
                handles.append(module.register_forward_pre_hook(Before(gates[name])))
            else:
                after = After(gates[name], _unwrapped(get_wrapped(model, reader)))
                handles.append(module.register_forward_hook(after))
    return handles


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module under PEFT's wrappers."""
    while "base_layer" in module._modules:
        module = module.get_submodule("base_layer")
    return module


def attach_depth_gate(model: PreTrainedModel, architecture: Architecture, gate: DepthGate) -> list[RemovableHandle]:
    """Make every layer that takes no part hand on its input.

    Returns:
        Handles; removing them all leaves the model as it was.
    """
    layers = [model.get_submodule(paths.layer) for paths in layer_paths(model, architecture)]
    return [layer.register_forward_hook(_Skipped(gate, i), with_kwargs=True) for i, layer in enumerate(layers)]


def strip_gates(model: nn.Module) -> None:
    """Remove the gate hooks that a copy of a gated model brought along."""
    for module in model.modules():
        for hooks, with_kwargs in (
            (module._forward_hooks, module._forward_hooks_with_kwargs),
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        ):
            for key in [k for k, hook in hooks.items() if isinstance(hook, GateHook)]:
                del hooks[key]
                with_kwargs.pop(key, None)
        override = module.__dict__.get("forward")
        if isinstance(override, ForwardOverride):
            override.remove()


class GateHook:
    """A hook that a method puts on a model: an object, not a closure, so that a copy of the model has its own."""


class ForwardOverride(GateHook):
    """Stands in front of a module's forward, where a hook would compute too much; subclasses are called instead."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def attach(self) -> ForwardOverride:
        """Take the module's place; itself, as a handle."""
        self.module.forward = self
        return self

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.module.__dict__.get("forward") is self:
            del self.module.forward


class Before(GateHook):
    """Multiplies what goes into a module."""

    def __init__(self, gate: nn.Module) -> None:
        self.gate = gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.gate(args[0]), *args[1:])


class After(GateHook):
    """Multiplies what comes out of a module: of a model that was pruned before, the channels that ``reader`` reads."""

    def __init__(self, gate: nn.Module, reader: nn.Module) -> None:
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
