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
from .kinds import AdapterKind, kind_of
from .verify import PROBES, TOLERANCE


def can_absorb(kind: AdapterKind, layer: Any, weight: torch.Tensor | None) -> bool:
    """Whether weights can be found under the layer's active adapters that make up a given effective weight.

    Args:
        kind: of the adapters.
        layer: as it is in the dense model.
        weight: the effective weight; None where only the bias is new.

    Raises:
        AdapterError: the layer has adapters that are not active; new weights hold for those that are.
    """
    others = _inactive(layer)
    if others:
        raise AdapterError(
            f"the plan's new weights hold with the adapters {active_of(layer)} active, and {others} would not fit "
            "them: delete_adapter() those and compensate again for each, or prune without compensation"
        )
    return isinstance(layer.get_base_layer(), nn.Linear) and kind.absorbs(layer, weight)


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
            return f"the {kind.name} adapter of {name} would have to be merged into the new weights"
    return None


def _inactive(layer: Any) -> list[str]:
    return sorted(set(layer._get_available_adapters()) - set(active_of(layer)))


@torch.no_grad()
def absorb(kind: AdapterKind, name: str, layer: Any, adapters: list[str], effective: Any) -> None:
    """Change the weights under adapters so that, with ``adapters`` active, the layer computes what a Linear does.

    Args:
        kind: of the adapters.
        name: of the layer.
        layer: of the small model; its adapters are in place.
        adapters: names of those that act.
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
        kind.take_out(layer, base, adapter)
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
