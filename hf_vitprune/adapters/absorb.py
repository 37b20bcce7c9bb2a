"""Layers whose weights a plan replaces: adapters stay adapters, and the weights under them make up the difference."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterError
from ..peft_twin import whole_shadow
from .verify import PROBES, TOLERANCE

#: kinds whose part of the effective weight can be taken out of it again
ABSORBED = ("LORA", "ADALORA", "LOHA", "IA3")
#: kinds that follow the linear maps of a plan: what they add is a product of two matrices
FOLLOWING = ("LORA", "ADALORA")
#: factors of IA3 under this divide too badly
SMALLEST_FACTOR = 1e-3


def can_absorb(kind: str, layer: Any, weight: torch.Tensor | None) -> bool:
    """Whether weights can be found under the layer's active adapters that make up a given effective weight.

    Args:
        kind: of the adapters.
        layer: as it is in the dense model.
        weight: the effective weight; None where only the bias is new.
    """
    base = layer.get_base_layer()
    if kind not in ABSORBED or not isinstance(base, nn.Linear):
        return False
    if kind == "IA3":
        return all(bool((t.abs() > SMALLEST_FACTOR).all()) for t in layer.ia3_l.values())
    if any(getattr(layer, "lora_bias", {}).values()) and base.bias is None:
        return False
    # DoRA divides by the norms of the rows
    return not getattr(layer, "lora_variant", {}) or weight is None or bool((weight != 0).any(1).all())


def active_of(layer: BaseTunerLayer) -> list[str]:
    """The layer's adapters that are active."""
    available = layer._get_available_adapters()
    return [name for name in layer.active_adapters if name in available]


@torch.no_grad()
def absorb(kind: str, name: str, layer: Any, adapters: list[str]) -> None:
    """Change the weights under adapters so that, with ``adapters`` active, the layer has the weights it has now.

    Raises:
        AdapterError: it has not, by more than rounding explains.
    """
    base = layer.get_base_layer()
    weight = base.weight.detach().clone()
    bias = None if base.bias is None else base.bias.detach().clone()
    for adapter in adapters:
        _take_out(kind, layer, base, adapter)
    probe = whole_shadow(layer).eval()
    probe._active_adapter = list(adapters)
    inputs = torch.randn(PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    expected = F.linear(inputs, weight, bias)
    error = float((probe(inputs) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if math.isnan(error) or error > TOLERANCE.get(weight.dtype, 0.0):
        raise AdapterError(
            f"the adapters of {name} do not fit its new weights ({error:.1e} relative); please report this, and prune "
            "model.merge_and_unload() meanwhile"
        )


def _take_out(kind: str, layer: Any, base: nn.Linear, adapter: str) -> None:
    if kind == "IA3":
        factors = layer.ia3_l[adapter].to(base.weight)
        base.weight.data /= factors
        if base.bias is not None and not layer.is_feedforward:
            base.bias.data /= factors.flatten()
        return
    if adapter in getattr(layer, "lora_variant", {}):
        layer.lora_magnitude_vector[adapter].weight.data.copy_(base.weight.norm(dim=1))
    base.weight.data -= layer.get_delta_weight(adapter).to(base.weight)
    if base.bias is not None and getattr(layer, "lora_bias", {}).get(adapter):
        base.bias.data -= (layer.scaling[adapter] * layer.lora_B[adapter].bias).to(base.bias)
