"""Kinds that change a weight otherwise than LoRA: by factors (IA3, HiRA), products (LoHa), what all layers share
(VeRA), or rotations of the input (OFT, HRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .kind import AdapterKind, LayerCut, Side, Tensors

#: factors under this divide too badly
SMALLEST_FACTOR = 1e-2


class Ia3Kind(AdapterKind):
    """One factor for every output of a layer, or for every input of a feed-forward layer."""

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


class HiraKind(AdapterKind):
    """A low-rank matrix multiplies the weight element by element."""

    name = "HIRA"
    sides = {"hira_A": "in", "hira_B": "out"}

    def absorbs(self, layer: Any, weight: torch.Tensor | None) -> bool:
        names = layer._get_available_adapters()
        return len(names) == 1 and all(bool((self.factors(layer, a).abs() > SMALLEST_FACTOR).all()) for a in names)

    def take_out(self, layer: Any, base: nn.Linear, adapter: str) -> None:
        base.weight.data /= self.factors(layer, adapter).to(base.weight)

    def factors(self, layer: Any, adapter: str) -> torch.Tensor:
        return 1 + layer.get_delta_weight(adapter).detach()


class LohaKind(AdapterKind):
    """The change of the weight is the elementwise product of two low-rank matrices."""

    name = "LOHA"
    sides = {"hada_w1_a": "out", "hada_w1_b": "in", "hada_w2_a": "out", "hada_w2_b": "in"}
    scaled = "hada_w1_b"
    additive = True


class VeraKind(AdapterKind):
    """All layers share two random matrices, and read the first rows and columns of them."""

    name = "VERA"
    additive = True

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


class OftKind(AdapterKind):
    name = "OFT"
    changes_inputs = True


class HraKind(OftKind):
    name = "HRA"
