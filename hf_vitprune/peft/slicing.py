"""Adapter tensors of one layer, sliced like the weight that the adapter belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..plan.layer_plan import PAD
from ..surgery.cuts import Cut

Side = Literal["in", "out", "none"]
#: name of a tensor within its layer -> the new tensor, and whether it is trained
Tensors = dict[str, tuple[torch.Tensor, bool]]

#: kind of adapter -> side of the weight that each of its tensors belongs to; rows are outputs, columns inputs
SIDES: dict[str, dict[str, Side]] = {
    "LORA": {"lora_A": "in", "lora_B": "out", "lora_magnitude_vector": "out"},
    "ADALORA": {"lora_A": "in", "lora_B": "out", "lora_E": "none", "ranknum": "none"},
    "HIRA": {"hira_A": "in", "hira_B": "out"},
    "LOHA": {"hada_w1_a": "out", "hada_w1_b": "in", "hada_w2_a": "out", "hada_w2_b": "in"},
    "IA3": {"ia3_l": "out"},
}
#: the tensor that takes the factors which a plan folds into the columns of the weight. Adapters that multiply the
#: weight elementwise (HiRA, IA3) get them from the weight
SCALED = {"LORA": "lora_A", "ADALORA": "lora_A", "LOHA": "hada_w1_b"}
#: kinds that change the input of a layer: nothing to slice while all inputs stay
INPUT_CHANGES = ("OFT", "HRA", "REPADAPTER")


@dataclass(frozen=True)
class LayerCut:
    """Which rows (outputs) and columns (inputs) of a weight stay, and the factors of the columns; None: all, ones."""

    rows: torch.Tensor | None
    columns: torch.Tensor | None
    scale: torch.Tensor | None

    @classmethod
    def of(cls, cut: Cut, shape: torch.Size) -> LayerCut:
        def index(axis: int) -> torch.Tensor | None:
            kept = cut.index.get(axis)
            whole = kept is None or torch.equal(kept.cpu(), torch.arange(shape[axis]))
            return None if whole else kept

        scale = cut.scale.get(1)
        return cls(index(0), index(1), None if scale is None or bool((scale == 1).all()) else scale)

    @property
    def is_whole(self) -> bool:
        return self.rows is None and self.columns is None and self.scale is None

    def take(self, tensor: torch.Tensor, side: Side, axis: int, scaled: bool = False) -> torch.Tensor:
        """The part of ``tensor`` that stays; its ``axis`` runs over the rows or columns of the weight."""
        kept = {"in": self.columns, "out": self.rows, "none": None}[side]
        cut = Cut("", {} if kept is None else {axis: kept})
        if scaled and self.scale is not None:
            cut.scale[axis] = self.scale
        return cut.take(tensor.detach())


def slice_layer(kind: str, layer: Any, cut: LayerCut) -> Tensors | None:
    """New tensors of a layer's adapters of one kind (``"LORA"``, ...); None: this kind cannot be sliced like that."""
    tensors = adapter_tensors(layer)
    if cut.is_whole or (kind in INPUT_CHANGES and cut.columns is None and cut.scale is None):
        return {name: (tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()}
    sides = SIDES.get(kind)
    base: Any = layer.get_base_layer()
    convolution = isinstance(base, nn.Conv2d) and kind in ("LORA", "IA3") and base.groups == 1
    if sides is None or not (isinstance(base, nn.Linear) or convolution) or getattr(layer, "fan_in_fan_out", False):
        return None
    if any(not _is_dora(variant) for variant in getattr(layer, "lora_variant", {}).values()):
        return None
    sliced: Tensors = {}
    for name, tensor in tensors.items():
        part = name.split(".")[0]
        if part not in sides:
            return None
        side, axis = sides[part], 1 if sides[part] == "in" else 0
        if part == "ia3_l":
            side = "in" if layer.is_feedforward else "out"
            axis = 1 if side == "in" or convolution else 0
        elif part == "lora_magnitude_vector":
            axis = 1 if convolution else 0
        sliced[name] = cut.take(tensor, side, axis, scaled=SCALED.get(kind) == part), tensor.requires_grad
    for adapter in getattr(layer, "lora_variant", {}):
        if not _rescale_magnitude(layer, adapter, cut, sliced):
            return None
    return sliced


def vera_as_lora(layer: Any, cut: LayerCut) -> Tensors:
    """LoRA tensors (scaling 1) of a layer's VeRA adapters: ``B[out] * lambda_b`` times ``lambda_d * A[:, in]``.

    VeRA layers share two matrices and read their first rows and columns, so a layer that keeps others has no VeRA.
    """
    lora: Tensors = {}
    for adapter, lambda_d in layer.vera_lambda_d.items():
        lambda_b = layer.vera_lambda_b[adapter]
        a = lambda_d.detach()[:, None] * layer.vera_A[adapter][:, : layer.in_features].to(lambda_d)
        b = lambda_b.detach()[:, None] * layer.vera_B[adapter][: layer.out_features].to(lambda_b)
        lora[f"lora_A.{adapter}.weight"] = cut.take(a, "in", 1, scaled=True), lambda_d.requires_grad
        lora[f"lora_B.{adapter}.weight"] = cut.take(b, "out", 0), lambda_b.requires_grad
    return lora


def adapter_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a tuner layer but those of the layer it wraps."""
    named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if not name.startswith("base_layer.")}


def _is_dora(variant: Any) -> bool:
    return type(variant).__name__ in ("DoraLinearVariant", "DoraConv2dVariant")


def _rescale_magnitude(layer: Any, adapter: str, cut: LayerCut, sliced: Tensors) -> bool:
    """Keep DoRA's ``magnitude / norm`` of every row when the norm loses or rescales columns.

    False where a row of the new weight is zero: its quotient would be 0 / 0.
    """
    weight = layer.get_base_layer().weight.detach()
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()
    delta = layer.scaling[adapter] * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    full = weight.to(delta.dtype) + delta
    small = cut.take(cut.take(full, "in", 1, scaled=True), "out", 0)
    norm = small.flatten(1).norm(dim=1)
    if bool((norm == 0).any()) or (cut.rows is not None and bool((cut.rows == PAD).any())):
        return False
    if cut.columns is not None or cut.scale is not None:
        name = f"lora_magnitude_vector.{adapter}.weight"
        magnitude, trained = sliced[name]
        ratio = norm / cut.take(full.flatten(1).norm(dim=1), "out", 0)
        sliced[name] = magnitude * ratio.to(magnitude.dtype).view_as(magnitude), trained
    return True
