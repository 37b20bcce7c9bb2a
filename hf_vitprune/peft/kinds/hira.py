"""HiRA: a low-rank matrix multiplies the weight element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .ia3 import SMALLEST_FACTOR
from .kind import AdapterKind, register_kind


class HiraKind(AdapterKind):
    name = "HIRA"
    sides = {"hira_A": "in", "hira_B": "out"}

    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        names = layer._get_available_adapters()
        return len(names) == 1 and all(bool((_factors(layer, a).abs() > SMALLEST_FACTOR).all()) for a in names)

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        base.weight.data /= _factors(layer, adapter).to(base.weight)


def _factors(layer: Any, adapter: str) -> torch.Tensor:
    return 1 + layer.get_delta_weight(adapter).detach()


register_kind(HiraKind())
