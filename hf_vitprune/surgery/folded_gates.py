"""Gates in training that are multiplied into the parameters beside them, not into every token's features.

A gate behind a LayerNorm scales its weight and bias; one in front of a Linear scales the columns of its weight. The
model computes the same, and what is read and written is as large as the module, not as the batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..utils.hooks import ForwardOverride
from .gates import Gate


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
    """Stands in front of a plain LayerNorm or Linear.

    Args:
        module: behind the gate, or in front of it.
        gate: of the module's outputs (LayerNorm) or inputs (Linear).
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
