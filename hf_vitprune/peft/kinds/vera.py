"""VeRA: all layers share two random matrices, and read the first rows and columns of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .kind import AdapterKind, LayerCut, Tensors, register_kind


class VeraKind(AdapterKind):
    name = "VERA"

    def fits(self, tuner: Any, layers: list[Any]) -> bool:
        """PEFT sizes the shared matrices by the largest layer it finds."""
        a, b = next(iter(tuner.vera_A.values())), next(iter(tuner.vera_B.values()))
        inputs = max((layer.in_features for layer in layers), default=0)
        outputs = max((layer.out_features for layer in layers), default=0)
        return (b.shape[0], a.shape[1]) == (outputs, inputs)

    def as_lora(self, layer: Any, cut: LayerCut) -> Tensors:
        """Of the same rank: ``B[out] * lambda_b`` times ``lambda_d * A[:, in]``."""
        lora: Tensors = {}
        for name, lambda_d in layer.vera_lambda_d.items():
            lambda_b = layer.vera_lambda_b[name]
            a = lambda_d.detach()[:, None] * layer.vera_A[name][:, : layer.in_features].to(lambda_d)
            b = lambda_b.detach()[:, None] * layer.vera_B[name][: layer.out_features].to(lambda_b)
            lora[f"lora_A.{name}.weight"] = cut.take(a, "in", 1, scaled=True), lambda_d.requires_grad
            lora[f"lora_B.{name}.weight"] = cut.take(b, "out", 0), lambda_b.requires_grad
        return lora

    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        return True

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        base.weight.data -= layer.get_delta_weight(adapter).to(base.weight)


register_kind(VeraKind())
