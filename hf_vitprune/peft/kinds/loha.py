"""LoHa: the change of the weight is the elementwise product of two low-rank matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .kind import AdapterKind, register_kind


class LohaKind(AdapterKind):
    name = "LOHA"
    sides = {"hada_w1_a": "out", "hada_w1_b": "in", "hada_w2_a": "out", "hada_w2_b": "in"}
    scaled = "hada_w1_b"

    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        return True

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        base.weight.data -= layer.get_delta_weight(adapter).to(base.weight)


register_kind(LohaKind())
