"""IA3: one factor for every output of a layer, or for every input of a feed-forward layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .kind import AdapterKind, Side, register_kind

#: factors under this divide too badly
SMALLEST_FACTOR = 1e-2


class Ia3Kind(AdapterKind):
    name = "IA3"
    sides = {"ia3_l": "out"}
    convolutions = True

    def rewrite(self, fields: dict[str, Any], layers: Mapping[str, Any]) -> None:
        fields["feedforward_modules"] = [name for name, layer in layers.items() if layer.is_feedforward]

    def place(self, part: str, layer: Any) -> tuple[Side, int]:
        convolution = isinstance(layer.get_base_layer(), nn.Conv2d)
        return ("in", 1) if layer.is_feedforward else ("out", int(convolution))

    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        return all(bool((factors.abs() > SMALLEST_FACTOR).all()) for factors in layer.ia3_l.values())

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        factors = layer.ia3_l[adapter].to(base.weight)
        factors = torch.where(factors == 0, torch.ones_like(factors), factors)  # of padding, whose weights are zero
        base.weight.data /= factors
        if base.bias is not None and not layer.is_feedforward:
            base.bias.data /= factors.flatten()


register_kind(Ia3Kind())
