"""What becomes of every layer with adapters when its model is pruned: sliced, merged into the base, or dropped."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import AdapterError
from ..modeling.peft_twin import tuner_layers
from ..modeling.structure import layer_paths
from ..plan.lineage import ALTERED_WEIGHTS, digest, digest_tensor
from ..plan.plan import PruningPlan
from ..surgery.cuts import Cut
from .absorb import can_absorb
from .configs import changes_base
from .methods.branch import BranchLayer
from .methods.convpass import ConvpassLayer
from .slicing import LayerCut, Tensors, adapter_tensors, slice_layer, vera_as_lora
from .types import kind_of

logger = logging.getLogger(__name__)


@dataclass
class Carried:
    """A layer whose adapters go over to the pruned model."""

    old: str
    new: str
    layer: BaseTunerLayer
    cut: LayerCut
    tensors: Tensors
    #: the plan has new weights for the layer: those under its adapters make up the difference
    absorbs: bool = False


@dataclass
class Decision:
    """What becomes of every layer with adapters. ``kind`` is the type of the new adapters."""

    kind: str
    carried: list[Carried] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)


def decide(model: Any, stock: Any, plan: PruningPlan, cuts: dict[str, Cut]) -> Decision:
    """Slice what can be sliced, name what has to be merged.

    Args:
        model: the PeftModel.
        stock: its plain twin.
        plan: for it.
        cuts: of every tensor of the small model.

    Raises:
        AdapterError: something has to be merged, and there are adapters that this would mix up.
    """
    layers = tuner_layers(model.get_base_model())
    kind = kind_of(next(iter(model.peft_config.values())))
    found = _new_names(cuts)
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    parts = []
    for old, layer in layers.items():
        if old in found:
            new = found[old]
            cut = _cut_of(layer, old, new, cuts, shapes)
            replaced = any(name.startswith(f"{new}.") for name in plan.weights)
            parts.append((old, new, layer, cut, replaced))
        elif isinstance(layer, ConvpassLayer) and old.startswith(_kept_layers(stock, plan)):
            raise AdapterError(
                f"the plan removes {old} and keeps its layer; the Convpass bypass beside it would be lost. Remove "
                "whole layers only"
            )
    decision = Decision(kind)
    cut_somewhere = any(not cut.is_whole for _, _, _, cut, _ in parts)
    if kind == "VERA" and (cut_somewhere or _vera_shrinks(model, [layer for _, _, layer, _, _ in parts])):
        decision.kind = "LORA"
    shared = bool(shared_tensors(model)) and decision.kind == kind and cut_somewhere
    for old, new, layer, cut, replaced in parts:
        tensors: Tensors | None = None
        fits = not replaced or can_absorb(decision.kind, layer, plan.weights.get(f"{new}.weight"))
        if fits and not shared:
            tensors = vera_as_lora(layer, cut) if decision.kind != kind else slice_layer(kind, layer, cut)
        if tensors is None:
            decision.merged.append(old)
        else:
            decision.carried.append(Carried(old, new, layer, cut, tensors, absorbs=replaced))
    _check_merges(model, decision)
    return decision


def _new_names(cuts: dict[str, Cut]) -> dict[str, str]:
    """Old name -> new name of every module that has tensors, itself or further down."""
    found = {}
    for name, cut in cuts.items():
        old, new = cut.source.split("."), name.split(".")
        while old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
            found[".".join(old)] = ".".join(new)
    return found


def _cut_of(
    layer: BaseTunerLayer, old: str, new: str, cuts: dict[str, Cut], shapes: dict[str, torch.Size]
) -> LayerCut:
    """What a layer with adapters loses; of a whole branch: inputs of what reads in it, outputs of what writes."""

    def cut(part: str = "") -> LayerCut:
        return LayerCut.of(cuts.get(f"{new}{part}.weight", Cut("")), shapes.get(f"{old}{part}.weight", torch.Size()))

    if not isinstance(layer, BranchLayer):
        return cut()
    readers = [cut(f".{name}") for name in layer.branch.readers]
    reader = next((c for c in readers if c.columns is not None or c.scale is not None), readers[0])
    return LayerCut(cut(f".{layer.branch.writer}").rows, reader.columns, reader.scale)


def _kept_layers(stock: Any, plan: PruningPlan) -> tuple[str, ...]:
    """Prefixes of what is in the layers that stay."""
    paths = layer_paths(stock, plan.source)
    return tuple(f"{paths[entry.index].layer}." for entry in plan.layers)


def _vera_shrinks(model: Any, layers: Iterable[Any]) -> bool:
    """PEFT sizes VeRA's shared matrices by the largest layer it finds."""
    inputs = max((layer.in_features for layer in layers), default=0)
    outputs = max((layer.out_features for layer in layers), default=0)
    shape = (
        next(iter(model.base_model.vera_B.values())).shape[0],
        next(iter(model.base_model.vera_A.values())).shape[1],
    )
    return (outputs, inputs) != shape


def _check_merges(model: Any, decision: Decision) -> None:
    if not decision.merged:
        return
    if decision.kind == "CONVPASS":
        raise AdapterError(
            f"the plan narrows what the Convpass bypass of {decision.merged[0]} reads or writes: it cannot be sliced, "
            "and being no linear map it cannot be merged. Remove whole layers, or heads and neurons inside branches"
        )
    names = list(model.peft_config)
    what = f"{decision.kind} adapters of {len(decision.merged)} layers ({', '.join(decision.merged[:3])}, ...)"
    if len(names) > 1 or any(
        set(layer._get_available_adapters()) - set(layer.active_adapters)
        for name, layer in tuner_layers(model.get_base_model()).items()
        if name in decision.merged
    ):
        raise AdapterError(
            f"the {what} cannot be sliced and would have to be merged, which ends the choice between {names}; keep "
            "one adapter, active (delete_adapter), or merge before pruning"
        )
    logger.warning(
        "%s adapter %r: %d of %d layers cannot be sliced and are merged into the base weights (they are no longer "
        "trainable as adapters): %s",
        decision.kind,
        names[0],
        len(decision.merged),
        len(decision.merged) + len(decision.carried),
        ", ".join(decision.merged),
    )


def altered_weights(base: Any, stock: Any, configs: dict[str, Any], decision: Decision) -> dict[str, Any]:
    """For the record: which layers' weights are not those of the dense checkpoint, and a digest of them."""
    changed = list(decision.merged)
    if any(changes_base(config) for config in configs.values()):
        changed = sorted({*changed, *tuner_layers(base)})
    if not changed:
        return {}
    kept = {name: stock.get_submodule(name).state_dict() for name in changed}
    adapters = {name: adapter_tensors(base.get_submodule(name)) for name in decision.merged}
    digests = [
        [name, {key: digest_tensor(t) for key, t in tensors.items()}]
        for part in (kept, adapters)
        for name, tensors in part.items()
    ]
    info: dict[str, Any] = {ALTERED_WEIGHTS: digest(digests)}
    if decision.merged:
        info["merged_adapters"] = {name: decision.merged for name in configs}
    return info


def shared_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What a tuner keeps once for all its layers (VeRA's projections, VB-LoRA's bank)."""
    tuner = model.base_model
    named = [*tuner.named_parameters(remove_duplicate=False), *tuner.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in named if not name.startswith("model.")}
