"""Layers whose weights a plan replaces: adapters stay adapters, and the weights under them make up the difference."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterError
from ..modeling.peft_twin import tuner_layers, whole_shadow
from .types import kind_of
from .verify import PROBES, TOLERANCE

#: kinds whose part of the effective weight can be taken out of it again
ABSORBED = ("LORA", "ADALORA", "LOHA", "VERA", "IA3", "HIRA")
#: factors (of IA3, and of every weight under HiRA) under this divide too badly
SMALLEST_FACTOR = 1e-2


def can_absorb(kind: str, layer: Any, weight: torch.Tensor | None) -> bool:
    """Whether weights can be found under the layer's active adapters that make up a given effective weight.

    Args:
        kind: of the adapters.
        layer: as it is in the dense model.
        weight: the effective weight; None where only the bias is new.

    Raises:
        AdapterError: the layer has adapters that are not active; new weights hold for those that are.
    """
    base, active = layer.get_base_layer(), active_of(layer)
    others = _inactive(layer)
    if others:
        raise AdapterError(
            f"the plan's new weights hold with the adapters {active} active, and {others} would not fit them: "
            "delete_adapter() those and compensate again for each, or prune without compensation"
        )
    if kind not in ABSORBED or not isinstance(base, nn.Linear):
        return False
    if kind == "IA3":
        return all(bool((t.abs() > SMALLEST_FACTOR).all()) for t in layer.ia3_l.values())
    if kind == "HIRA":
        return len(active) <= 1 and all(bool((_hira_factors(layer, a).abs() > SMALLEST_FACTOR).all()) for a in active)
    if any(getattr(layer, "lora_bias", {}).values()) and base.bias is None:
        return False
    if not getattr(layer, "lora_variant", {}):
        return True
    # DoRA divides by the norms of the rows
    return len(active) == 1 and (weight is None or bool((weight != 0).any(1).all()))


def active_of(layer: BaseTunerLayer) -> list[str]:
    """The layer's adapters that are active."""
    available = layer._get_available_adapters()
    return [name for name in layer.active_adapters if name in available]


def why_merged(model: Any) -> str | None:
    """Why new weights would end adapters of a PeftModel; None where all of them can stay."""
    kind = kind_of(next(iter(model.peft_config.values())))
    for name, layer in tuner_layers(model.get_base_model()).items():
        if _inactive(layer):
            return f"it would hold for the active adapter only, and there is {', '.join(_inactive(layer))} as well"
        if not can_absorb(kind, layer, None):
            return f"the {kind} adapter of {name} would have to be merged into the new weights"
    return None


def _inactive(layer: Any) -> list[str]:
    return sorted(set(layer._get_available_adapters()) - set(active_of(layer)))


@torch.no_grad()
def absorb(kind: str, name: str, layer: Any, adapters: list[str], effective: Any) -> None:
    """Change the weights under adapters so that, with ``adapters`` active, the layer computes what a Linear does.

    Args:
        kind: of the adapters.
        name: of the layer.
        layer: of the small model; its adapters are in place.
        effective: the Linear.

    Raises:
        AdapterError: it does not, by more than rounding explains.
    """
    base = layer.get_base_layer()
    weight = effective.weight.detach()
    bias = None if effective.bias is None else effective.bias.detach()
    base.weight.data.copy_(weight)
    if base.bias is not None:
        base.bias.data.copy_(bias)
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
        factors = torch.where(factors == 0, torch.ones_like(factors), factors)  # of padding, whose weights are zero
        base.weight.data /= factors
        if base.bias is not None and not layer.is_feedforward:
            base.bias.data /= factors.flatten()
        return
    if kind == "HIRA":
        base.weight.data /= _hira_factors(layer, adapter).to(base.weight)
        return
    if adapter in getattr(layer, "lora_variant", {}):
        layer.lora_magnitude_vector[adapter].weight.data.copy_(base.weight.norm(dim=1))
    base.weight.data -= layer.get_delta_weight(adapter).to(base.weight)
    if base.bias is not None and getattr(layer, "lora_bias", {}).get(adapter):
        base.bias.data -= (layer.scaling[adapter] * layer.lora_B[adapter].bias).to(base.bias)


def _hira_factors(layer: Any, adapter: str) -> torch.Tensor:
    """What HiRA multiplies the weight by, element by element."""
    return 1 + layer.get_delta_weight(adapter).detach()
