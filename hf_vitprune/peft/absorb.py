"""Adapters on layers that change: those over new weights stay, and every layer is tried with random inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterError
from ..modeling.peft_twin import tuner_layers, whole_shadow
from ..plan.layer_plan import PAD
from .kinds import AdapterKind, kind_of
from .kinds.kind import LayerCut

PROBES = 16
#: largest relative difference that rounding explains
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def can_absorb(kind: AdapterKind, layer: Any, weight: torch.Tensor | None) -> bool:
    """Whether weights can be found under the dense layer's active adapters that make up an effective weight.

    ``weight``: None where only the bias is new.

    Raises:
        AdapterError: the layer has adapters that are not active; new weights hold for those that are.
    """
    others = inactive_of(layer)
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


def inactive_of(layer: Any) -> list[str]:
    """Those that are not."""
    return sorted(set(layer._get_available_adapters()) - set(active_of(layer)))


def why_merged(model: Any) -> str | None:
    """Why new weights would end adapters of a PeftModel; None where all of them can stay."""
    kind = kind_of(next(iter(model.peft_config.values())))
    for name, layer in tuner_layers(model.get_base_model()).items():
        if inactive_of(layer):
            return f"it would hold for the active adapter only, and there is {', '.join(inactive_of(layer))} as well"
        if not can_absorb(kind, layer, None):
            return f"the {kind.name} adapter of {name} would have to be merged into the new weights"
    return None


@torch.no_grad()
def absorb(kind: AdapterKind, name: str, layer: Any, adapters: list[str], effective: nn.Linear) -> None:
    """Change the weights of a small model's layer under the adapters that act, so that it computes what a Linear does.

    Raises:
        AdapterError: it does not, by more than rounding explains.
    """
    base = layer.get_base_layer()
    weight, bias = effective.weight.detach(), None if effective.bias is None else effective.bias.detach()
    base.weight.data.copy_(weight)
    if base.bias is not None:
        base.bias.data.copy_(bias)
    for adapter in adapters:
        kind.take_out(layer, base, adapter)
    inputs = _random(PROBES, weight.shape[1]).to(weight)
    error = _difference(_run(layer, adapters, inputs), F.linear(inputs, weight, bias))
    if not error <= TOLERANCE.get(weight.dtype, 0.0):
        raise AdapterError(
            f"the adapters of {name} do not fit its new weights ({error:.1e} relative); please report this, and prune "
            "model.merge_and_unload() meanwhile"
        )


def verify_layer(name: str, old: BaseTunerLayer, new: BaseTunerLayer, adapters: list[str], cut: LayerCut) -> None:
    """Try whether a sliced layer computes what the full one does on the inputs that stay, each adapter active alone.

    Raises:
        AdapterError: one differs by more than rounding explains.
    """
    base: Any = old.get_base_layer()
    if not isinstance(base, (nn.Linear, nn.Conv2d)):
        if cut.is_whole or not hasattr(base, "weight"):  # the same tensors on the same inputs, of a layer or a branch
            return
        raise AdapterError(f"an adapter on {name}, a {type(base).__name__}, cannot be sliced")
    small, full = _probes(base, new.get_base_layer(), cut)
    for adapter in adapters:
        expected = cut.take(_run(old, [adapter], full), "out", 1)
        error = _difference(_run(new, [adapter], small), expected)
        if not error <= TOLERANCE.get(base.weight.dtype, 0.0):
            raise AdapterError(
                f"the sliced adapter {adapter!r} of {name} differs from the full one by {error:.1e} relative; please "
                "report this, and prune model.merge_and_unload() meanwhile"
            )


def _probes(old: Any, new: Any, cut: LayerCut) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs of the new layer, (probes, inputs) or (probes, channels, kernel, kernel), and of the old one."""
    shape = (new.in_features,) if isinstance(old, nn.Linear) else (new.in_channels, *new.kernel_size)
    small = _random(PROBES, *shape).to(new.weight)
    full = small if cut.scale is None else small * cut.scale.to(small)
    if cut.columns is None:
        return small, full
    columns = cut.columns.to(full.device)
    real = (columns != PAD).nonzero().squeeze(1)
    places = full.new_zeros(PROBES, old.weight.shape[1], *full.shape[2:])
    return small, places.index_copy(1, columns[real], full.index_select(1, real))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _run(layer: Any, adapters: list[str], inputs: torch.Tensor) -> torch.Tensor:
    probe = whole_shadow(layer).eval()  # without hooks, and the layer keeps its mode and active adapters
    probe._active_adapter = list(adapters)
    return probe(inputs)


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
