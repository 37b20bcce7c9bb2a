"""Surgery on a plain transformers model: the small one, or the full-size one that computes the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidPlanError
from ..modeling import config_for, pruned_model_class
from ..modeling.blocks import RemovedAttention, mask_layer_norm
from ..modeling.structure import finish_mixers, layer_paths, put, replace_mixer
from ..plan.lineage import lineage
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from .cuts import Cut, find_cuts, small_state
from .gates import strip_gates


def prune_plain(model: PreTrainedModel, plan: PruningPlan, *, allow_unchanged: bool = False) -> PreTrainedModel:
    """``surgery.prune`` of a model without adapters."""
    check_plan(model, plan, allow_unchanged)
    small = empty_like(model, plan)
    state = small_state(model.state_dict(), model, small, plan)
    small.load_state_dict(state, strict=True, assign=True)
    _copy_frozen_buffers(model, small, plan)
    cuts = find_cuts(model, small, plan)
    for name, parameter in small.named_parameters():
        if name in cuts:  # the rest is new
            parameter.requires_grad_(model.get_parameter(cuts[name].source).requires_grad)
    return small.train(model.training)


def mask_plain(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """``surgery.mask`` of a model without adapters."""
    check_plan(model, plan, allow_unchanged=True)
    small = empty_like(model, plan)
    state = small_state(model.state_dict(), model, small, plan)
    full = copy.deepcopy(model)
    strip_gates(full)
    tensors = full.state_dict()
    with torch.no_grad():
        for name, cut in find_cuts(model, small, plan).items():
            if tensors[cut.source].is_floating_point():  # an index buffer of the small model has no place here
                tensors[cut.source].copy_(cut.scatter(state[name], tensors[cut.source].shape))
        for prefix in _removed_branches(model, plan):
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    tensor.zero_()
    _replace_mixers(full, small, state, plan)
    if plan.embedding is not None:
        kept = torch.tensor(plan.embedding, device=next(full.parameters()).device)
        for norm in residual_norms(full, plan.source):
            mask_layer_norm(norm, kept)
    return full


def check_plan(model: PreTrainedModel, plan: PruningPlan, allow_unchanged: bool) -> None:
    """Refuse a plan made for another shape, or one that changes nothing.

    Raises:
        InvalidPlanError: with what differs.
    """
    plan.validated()
    actual = Architecture.of(model)
    if not plan.source.fits(actual):
        raise InvalidPlanError(
            f"the plan was made for a {plan.source.model_type} of {len(plan.source.layers)} layers and width "
            f"{plan.source.hidden_size} with its own layer sizes; this {actual.model_type} of {len(actual.layers)} "
            f"layers and width {actual.hidden_size} is another shape. Make the plan from this model."
        )
    unchanged = plan.removes_nothing and not plan.weights and not any(e.scales for e in plan.layers)
    if unchanged and not allow_unchanged:
        raise InvalidPlanError("the plan removes nothing: the pruned model would be the model itself")


def empty_like(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """The small model on the meta device, without weights."""
    info = dict(plan.info)
    base = getattr(model.config, "_name_or_path", "")
    if base and not Path(base).exists():  # a Hub id; a folder of this machine is nobody else's business
        info.setdefault("base_model", base)
    info.update(lineage(model.config, plan))
    config = config_for(plan.architecture, model.config, info)
    _follow_backbone_stages(model, config, plan)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            small = pruned_model_class(type(model))(config)
    finally:
        torch.set_default_dtype(before)
    prefix = plan.source.family.encoder_path(model)
    if getattr(model.get_submodule(prefix.rstrip(".")), "pooler", 0) is None:
        encoder: Any = small.get_submodule(prefix.rstrip("."))
        encoder.pooler = None  # a base model made without its pooling layer
    return small


def _removed_branches(model: PreTrainedModel, plan: PruningPlan) -> list[str]:
    """Prefixes of the parameters that write a removed branch into the residual stream."""
    paths = layer_paths(model, plan.source)
    kept = {entry.index: entry for entry in plan.layers}
    prefixes = []
    for i, (path, shape) in enumerate(zip(paths, plan.source.layers, strict=True)):
        entry = kept.get(i)
        if shape.mixer == "attention" and (entry is None or entry.mixer == "none"):
            prefixes.append(f"{path.o}.")
        if shape.mlp and (entry is None or not entry.mlp):
            prefixes.append(f"{path.fc2}.")
    return prefixes


def _replace_mixers(
    full: PreTrainedModel, small: PreTrainedModel, state: dict[str, torch.Tensor], plan: PruningPlan
) -> None:
    """Put the mixers that the plan makes, or that zeros cannot silence, into the full-size model, in place."""
    source, family = plan.source, plan.source.family
    kept = {
        e.index: (e, new.attention) for e, new in zip(plan.layers, layer_paths(small, plan.architecture), strict=True)
    }
    for i, (paths, shape) in enumerate(zip(layer_paths(full, source), source.layers, strict=True)):
        entry, prefix = kept.get(i, (None, ""))
        if entry is None or entry.mixer == "none":
            if shape.mixer not in ("attention", "none"):  # special tokens pass it, whatever its weights
                put(full, paths.attention, RemovedAttention())
        elif entry.replaces_mixer(shape):
            replace_mixer(full, family, source.config, paths, entry.shape(shape), source.width(i))
            mixer = full.get_submodule(paths.attention)
            _fill_mixer(mixer, {name: state[f"{prefix}.{name}"] for name in mixer.state_dict()}, plan)
            mixer.train(full.training)
    finish_mixers(full, family)


def _fill_mixer(mixer: nn.Module, weights: dict[str, torch.Tensor], plan: PruningPlan) -> None:
    """Give a full-size mixer the weights of a small one, at the places of the kept residual channels."""
    for name, full in mixer.state_dict().items():
        if weights[name].shape != full.shape:
            index = torch.tensor(plan.embedding)
            weights[name] = Cut(name, {1 if name == "conv.weight" else 0: index}).scatter(weights[name], full.shape)
    mixer.load_state_dict(weights, assign=True)


def residual_norms(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """Every LayerNorm that runs over the residual stream."""
    family = architecture.family
    prefix = family.encoder_path(model)
    names = [prefix + name for name in family.norms]
    for paths, shape in zip(layer_paths(model, architecture), architecture.layers, strict=True):  # type: ignore[arg-type]
        names += [paths.norm1] if shape.mixer != "none" else []
        names += [paths.norm2] if shape.mlp else []
    return [model.get_submodule(name) for name in names]


def _follow_backbone_stages(model: PreTrainedModel, config: Any, plan: PruningPlan) -> None:
    """Backbones name the layers whose output they give; the names follow the layers.

    Raises:
        InvalidPlanError: a layer whose output is asked for is removed.
    """
    if not type(model).__name__.endswith("Backbone") or plan.source.depths is not None:
        return
    position = {entry.index: j for j, entry in enumerate(plan.layers)}
    names = []
    for index in model.config.out_indices:
        index = index % (len(plan.source.layers) + 1)
        if index > 0 and index - 1 not in position:
            raise InvalidPlanError(
                f"the plan removes layer {index - 1}, whose output this backbone gives (out_features)"
            )
        names.append("stem" if index == 0 else f"stage{position[index - 1] + 1}")
    config.set_output_features_output_indices(out_features=names, out_indices=None)


def _copy_frozen_buffers(model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan) -> None:
    """Buffers that are not saved (position indices) depend on no size that a plan changes."""
    old_paths, new_paths = layer_paths(model, plan.source), layer_paths(small, plan.architecture)
    renamed = {new.layer: old_paths[e.index].layer for new, e in zip(new_paths, plan.layers, strict=True)}
    source = dict(model.named_buffers())
    for name, buffer in list(small.named_buffers()):
        if buffer.device.type == "meta":
            layer = next((new for new in renamed if name.startswith(new + ".")), None)
            old = source[name if layer is None else renamed[layer] + name[len(layer) :]]
            parent, _, leaf = name.rpartition(".")
            small.get_submodule(parent).register_buffer(leaf, old.clone(), persistent=False)
