"""Factors that units are multiplied by: learned scores, hard masks, the number of layers that take part."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.hooks import ForwardOverride


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
        self.score = nn.Parameter(torch.ones(units, dtype=torch.float32, device=device))
        self.register_buffer("mask", torch.ones(units, dtype=torch.float32, device=device))
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

    ``kept``: (layers,) buffer of booleans.
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


class UnitMask(nn.Module):
    """A factor of 0 or 1 for every unit of a place; costs nothing while all are 1.

    The mask, (units,), follows from what a method keeps in its own buffers, so checkpoints do not hold it.
    """

    mask: torch.Tensor

    def __init__(self, units: int, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(units, dtype=torch.float32, device=device), persistent=False)
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


class _ScaledLinear(torch.autograd.Function):
    """``linear(features, weight * gate, bias)`` that keeps no product: it is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(features, weight, gate)
        return F.linear(features, weight * gate, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        features, weight, gate = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_product = rows.t() @ features.flatten(0, -2)
        precise = torch.promote_types(weight.dtype, torch.float32)
        of_gate = (of_product * weight).sum(0, dtype=precise).to(gate.dtype)
        of_features = grad @ (weight * gate) if ctx.needs_input_grad[0] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        return of_features, of_product.mul_(gate), of_gate, of_bias


class FoldedGate(ForwardOverride):
    """A gate of the outputs of a plain LayerNorm, or of the inputs of a plain Linear, multiplied into its parameters.

    The model computes the same, and what is read and written is as large as the module, not as the batch.
    """

    def __init__(self, module: nn.Module, gate: Gate) -> None:
        super().__init__(module)
        self.gate = gate

    @classmethod
    def of(cls, module: nn.Module, gate: nn.Module, kind: type[nn.LayerNorm | nn.Linear]) -> FoldedGate | None:
        """None where the module is not plainly of its kind, or the gate is a mask."""
        plain = type(module) is kind and "forward" not in vars(module)
        if not isinstance(gate, Gate) or not plain or (kind is nn.LayerNorm and module.bias is None):
            return None
        return cls(module, gate)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        module, gate = self.module, self.gate
        norm = isinstance(module, nn.LayerNorm)
        if not self._pays(features):
            return (
                gate(type(module).forward(module, features)) if norm else type(module).forward(module, gate(features))
            )
        factors = gate.factors().to(module.weight.dtype)
        if norm:
            weight, bias = module.weight * factors, module.bias * factors
            return F.layer_norm(features, module.normalized_shape, weight, bias, module.eps)
        return _ScaledLinear.apply(features, module.weight, factors, module.bias)

    def _pays(self, features: torch.Tensor) -> bool:
        """Whether it is training in one precision, and the weight is smaller than the features."""
        weight = self.module.weight
        learns = self.gate.training and torch.is_grad_enabled()
        smaller = weight.ndim == 1 or (features.ndim > 1 and features[..., 0].numel() > len(weight))
        return learns and smaller and not torch.is_autocast_enabled(features.device.type)
