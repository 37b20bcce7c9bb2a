"""What becomes of every layer with adapters when its model is pruned: sliced, merged into the base, or dropped."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..errors import AdapterError
from ..modeling.peft_twin import tuner_layers
from ..modeling.structure import layer_paths
from ..plan.lineage import ALTERED_WEIGHTS, digest, digest_tensor
from ..plan.plan import PruningPlan
from ..surgery.cuts import Cut
from .absorb import can_absorb, inactive_of
from .kinds import AdapterKind, kind_named, kind_of
from .kinds.kind import LayerCut, Tensors, adapter_tensors

logger = logging.getLogger(__name__)


def under(part: str, name: str) -> str:
    """The name in the whole model of what is called ``name`` in the tower at ``part`` ("": the model itself)."""
    return f"{part}.{name}" if part else name


def cuts_with_tower(whole: Any, cuts: Mapping[str, Cut], part: str) -> dict[str, Cut]:
    """Cuts of the tensors of a tower, as those of all tensors of the model that it is in."""
    inside = {under(part, name): Cut(under(part, cut.source), cut.index, cut.scale) for name, cut in cuts.items()}
    prefix = under(part, "")
    return inside | {name: Cut(name) for name in whole.state_dict() if not name.startswith(prefix)}


@dataclass
class Carried:
    """A layer whose adapters go over to the pruned model."""

    old: str
    new: str
    layer: BaseTunerLayer
    cut: LayerCut
    #: the plan has new weights for the layer: those under its adapters make up the difference
    absorbs: bool
    tensors: Tensors = field(default_factory=dict)


@dataclass
class Decision:
    """What becomes of every layer with adapters. ``kind`` is that of the new adapters."""

    kind: AdapterKind
    carried: list[Carried] = field(default_factory=list)
    merged: list[str] = field(default_factory=list)


def decide(model: Any, stock: Any, plan: PruningPlan, cuts: dict[str, Cut], part: str = "") -> Decision:
    """Slice what can be sliced, else make LoRA of all of it, else name what has to be merged.

    ``stock`` is the PeftModel's plain twin, ``plan`` is for its tower at ``part``, with names of the whole model.

    Raises:
        AdapterError: something has to be merged, and there are adapters that this would mix up.
    """
    kind = kind_of(next(iter(model.peft_config.values())))
    found = new_names(cuts)
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    parts = []
    for old, layer in tuner_layers(model.get_base_model()).items():
        if old in found:
            cut = kind.cut_of(layer, partial(_cut_of, old, found[old], cuts, shapes))
            replaced = any(name.startswith(f"{found[old]}.") for name in plan.weights)
            parts.append(Carried(old, found[old], layer, cut, replaced))
        elif kind.cannot_be_merged and old.startswith(_kept_layers(stock, plan, part)):
            raise AdapterError(
                f"the plan removes {old} and keeps its layer; the {kind.name} adapter beside it would be lost. Remove "
                "whole layers only"
            )
    cut_somewhere = any(not one.cut.is_whole for one in parts)
    shared = bool(shared_tensors(model)) and cut_somewhere
    sliced = [None if shared else kind.slice(one.layer, one.cut) for one in parts]
    if None in sliced or not kind.fits(model.base_model, [one.layer for one in parts]):
        converted = [kind.as_lora(one.layer, one.cut) for one in parts]
        if None not in converted:
            kind, sliced = kind_named("LORA"), converted
    decision = Decision(kind)
    for one, tensors in zip(parts, sliced, strict=True):
        fits = not one.absorbs or can_absorb(kind, one.layer, plan.weights.get(f"{one.new}.weight"))
        if tensors is None or not fits:
            decision.merged.append(one.old)
        else:
            one.tensors = tensors
            decision.carried.append(one)
    _check_merges(model, decision, part)
    return decision


def new_names(cuts: dict[str, Cut]) -> dict[str, str]:
    """Old name -> new name of every module that has tensors, itself or further down."""
    found = {}
    for name, cut in cuts.items():
        old, new = cut.source.split("."), name.split(".")
        while old and new and old[-1] == new[-1]:
            old, new = old[:-1], new[:-1]
            found[".".join(old)] = ".".join(new)
    return found


def _cut_of(old: str, new: str, cuts: dict[str, Cut], shapes: dict[str, torch.Size], part: str) -> LayerCut:
    tensor = f".{part}.weight" if part else ".weight"
    return LayerCut.of(cuts.get(new + tensor, Cut("")), shapes.get(old + tensor, torch.Size()))


def _kept_layers(stock: Any, plan: PruningPlan, part: str) -> tuple[str, ...]:
    """Prefixes of what is in the layers that stay."""
    paths = layer_paths(stock.get_submodule(part), plan.source)
    return tuple(under(part, f"{paths[entry.index].layer}.") for entry in plan.layers)


def _check_merges(model: Any, decision: Decision, part: str) -> None:
    if not decision.merged:
        return
    outside = [name for name in decision.merged if not name.startswith(under(part, ""))]
    if outside:
        raise AdapterError(
            f"{decision.kind.name} adapters share tensors, so that those of the tower cannot be merged without those "
            f"elsewhere ({outside[0]}, ...); merge_and_unload() the model first, or remove whole layers only"
        )
    if decision.kind.cannot_be_merged:
        raise AdapterError(
            f"the plan narrows what the {decision.kind.name} adapter of {decision.merged[0]} reads or writes, which "
            f"cannot be sliced; {decision.kind.cannot_be_merged}. Remove whole layers, or heads and neurons inside "
            "branches"
        )
    names = list(model.peft_config)
    what = f"{decision.kind.name} adapters of {len(decision.merged)} layers ({', '.join(decision.merged[:3])}, ...)"
    layers = tuner_layers(model.get_base_model())
    if len(names) > 1 or any(inactive_of(layers[name]) for name in decision.merged):
        raise AdapterError(
            f"the {what} cannot be sliced and would have to be merged, which ends the choice between {names}; keep "
            "one adapter, active (delete_adapter), or merge before pruning"
        )
    logger.warning(
        "%s adapter %r: %d of %d layers cannot be sliced and are merged into the base weights (they are no longer "
        "trainable as adapters): %s",
        decision.kind.name,
        names[0],
        len(decision.merged),
        len(decision.merged) + len(decision.carried),
        ", ".join(decision.merged),
    )


def altered_weights(base: Any, stock: Any, configs: dict[str, Any], decision: Decision) -> dict[str, Any]:
    """For the record: which layers' weights are not those of the dense checkpoint, and a digest of them."""
    changed = list(decision.merged)
    if any(kind_of(config).changes_base(config) for config in configs.values()):
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
