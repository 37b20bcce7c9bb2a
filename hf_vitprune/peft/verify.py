"""Does a sliced layer compute what the full one computes on the inputs that stay? Asked of every adapter."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterError
from ..modeling.peft_twin import whole_shadow
from ..plan.layer_plan import PAD
from .kinds.kind import LayerCut

PROBES = 16
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def verify_layer(
    name: str, old: BaseTunerLayer, new: BaseTunerLayer, adapters: list[str], cut: LayerCut
) -> dict[str, float]:
    """Largest relative difference of every adapter, each active alone.

    Raises:
        AdapterError: one is larger than rounding explains.
    """
    base: Any = old.get_base_layer()
    if not isinstance(base, (nn.Linear, nn.Conv2d)):
        if cut.is_whole or not hasattr(base, "weight"):  # the same tensors on the same inputs, of a layer or a branch
            return {}
        raise AdapterError(f"an adapter on {name}, a {type(base).__name__}, cannot be sliced")
    small, full = _probes(base, new.get_base_layer(), cut)
    errors = {}
    for adapter in adapters:
        expected = cut.take(_run(old, adapter, full), "out", 1)
        actual = _run(new, adapter, small)
        error = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if math.isnan(error) or error > TOLERANCE.get(base.weight.dtype, 0.0):
            raise AdapterError(
                f"the sliced adapter {adapter!r} of {name} differs from the full one by {error:.1e} relative; please "
                "report this, and prune model.merge_and_unload() meanwhile"
            )
        errors[adapter] = error
    return errors


def _probes(old: Any, new: Any, cut: LayerCut) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs of the new layer, (probes, inputs) or (probes, channels, kernel, kernel), and of the old one."""
    generator = torch.Generator().manual_seed(0)
    shape = (new.in_features,) if isinstance(old, nn.Linear) else (new.in_channels, *new.kernel_size)
    small = torch.randn(PROBES, *shape, generator=generator).to(new.weight)
    if cut.columns is None and cut.scale is None:
        return small, small
    full = small if cut.scale is None else small * cut.scale.to(small)
    if cut.columns is None:
        return small, full
    columns = cut.columns.to(full.device)
    real = (columns != PAD).nonzero().squeeze(1)
    scattered = full.new_zeros(PROBES, old.weight.shape[1], *full.shape[2:]).index_copy(
        1, columns[real], full.index_select(1, real)
    )
    return small, scattered


@torch.no_grad()
def _run(layer: Any, adapter: str, inputs: torch.Tensor) -> torch.Tensor:
    probe = whole_shadow(layer).eval()  # without hooks, and the layer keeps its mode and active adapters
    probe._active_adapter = [adapter]
    return probe(inputs)
