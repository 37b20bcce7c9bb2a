"""Surgery on a plain transformers model: the small one."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidPlanError, ModelMismatchError
from ..families import LayerPaths
from ..modeling import config_for, pruned_model_class
from ..modeling.custom import CUSTOM, custom_parts
from ..modeling.outer import Outer, find_outer, narrow_outer
from ..modeling.registry import stock_ancestor
from ..modeling.structure import layer_paths, resize_
from ..plan.lineage import lineage, named_source
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from ..spec.configs import lineage_of
from ..utils.hooks import strip_gates
from ..utils.modules import get, meta_copy, named_tensors, owner, put
from ..utils.offload import StateDict
from .cuts import renamed_layers, small_state, source_name


def prune_plain(
    model: PreTrainedModel,
    plan: PruningPlan,
    *,
    allow_unchanged: bool = False,
    checked: bool = False,
    given_away: Collection[str] = (),
    state: StateDict | None = None,
) -> Any:
    """``pruning.prune`` of a model without adapters: a copy of the live model, cut in place, as its pruned twin.

    Modules, attributes and hooks stay; only tensors that carry a removed unit are replaced. ``checked``: the plan is
    known to fit; for masked models, in which other mixers stand than their config says.
    ``given_away``: new weights of the plan that nobody else uses, so that the small model need not copy them.
    ``state``: the model's weights, where they are not its own.
    """
    if not checked:
        check_fits(model, plan, allow_unchanged)
    small = resized_copy(model, plan)
    tensors = small_state(StateDict(model) if state is None else state, model, small, plan, given_away)
    small.load_state_dict(tensors, strict=True, assign=True)
    kept = [entry.index for entry in plan.layers]
    tie(small, model, renamed_layers(layer_paths(model, plan.source), layer_paths(small, plan.architecture), kept))
    return small


def resized_copy(model: PreTrainedModel, plan: PruningPlan, outer: Outer | None = None) -> Any:
    """A copy of the live model with the plan's sizes, its weights on the meta device.

    ``outer``: what :func:`outer_of` finds, where it is known.
    """
    skeleton = empty_like(model, plan)
    kept = [entry.index for entry in plan.layers]
    small = resized(model, plan.source, plan.architecture, kept, skeleton.config, outer)
    prefix = plan.source.family.encoder_path(model)
    custom = custom_parts(type(model), stock_ancestor(type(model)), small, skeleton, prefix)
    if custom:
        before = (lineage_of(model.config).get(CUSTOM) or {}).get("layers", list(range(len(plan.source.layers))))
        info = small.config.pruning_config.setdefault("info", {})
        info[CUSTOM] = {**custom, "layers": [before[index] for index in kept]}
    return small


def resized(
    model: PreTrainedModel,
    source: Architecture,
    architecture: Architecture,
    kept: list[int],
    config: Any,
    outer: Outer | None = None,
) -> Any:
    """A copy of the live model of another shape, its weights on the meta device, as its pruned twin.

    Args:
        source, architecture: of the model, and of the copy.
        kept: positions of the layers that stay.
        config: of the copy; a pruned one.
        outer: what :func:`outer_of` finds, where it is known.
    """
    family = source.family
    replaced = {id(model.config): config, id(family.sizes_config(model.config)): family.sizes_config(config)}
    small = meta_copy(model, replaced)
    strip_gates(small)
    unshare_(small, layer_paths(small, source))
    outer = outer_of(model, source, architecture.hidden_size) if outer is None else outer
    known = {*small.modules()}
    with torch.device("meta"):
        resize_(small, architecture, kept)
        if outer is not None:
            narrow_outer(small, outer, source.hidden_size, architecture.hidden_size)
            family.narrow_stream(small, source.hidden_size, architecture.hidden_size)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    for module in {*small.modules()} - known:
        module.to(dtype)
    small.__class__ = pruned_model_class(type(model))
    small._built_as = architecture
    return small


def outer_of(model: PreTrainedModel, source: Architecture, kept: int) -> Outer | None:
    """What follows the residual width outside the layers when ``kept`` channels stay; None where all stay."""
    if kept == source.hidden_size:
        return None
    reads = source.family.has_neck(model.config, source.task) or source.family.read_states(
        model.config, source.task, len(source.layers)
    )
    few = source if reads or source.depths is not None else source.replace(layers=source.layers[:1])
    wide, narrow = (_skeleton(model, few.replace(hidden_size=width)) for width in (source.hidden_size, kept))
    layers = tuple(f"{paths.layer}." for paths in layer_paths(model, source))
    return find_outer(model, wide, narrow, layers, source.hidden_size, kept)


def tie(
    small: nn.Module, model: nn.Module, renamed: Mapping[str, str], missing: Collection[str] = ()
) -> Collection[str]:
    """Parameters that were one under several names, and are still alike, are one again.

    Args:
        renamed: see :func:`renamed_layers`.
        missing: names in the small model that have got no values.

    Returns:
        Those of the missing ones that are another one now.
    """
    held = {name: id(tensor) for name, tensor in named_tensors(model)}
    shared: dict[int, list[str]] = {}
    for name, _ in small.named_parameters(remove_duplicate=False):
        known = held.get(source_name(name, renamed))
        if known is not None:
            shared.setdefault(known, []).append(name)
    filled = set()
    for names in shared.values():
        first, *others = sorted(names, key=lambda name: name in missing)
        one = small.get_parameter(first)
        for name in others if first not in missing else ():
            module, leaf = owner(small, name)
            other = small.get_parameter(name)
            if other.shape == one.shape and (name in missing or torch.equal(other, one)):
                module._parameters[leaf] = one
                filled.add(name)
    return filled


def check_own_modules(model: Any, architecture: Architecture) -> None:
    """Refuse a module that two layers hold: gates on it would act in both. ModelMismatchError has the cure."""
    owners: dict[int, str] = {}
    for layer in layer_paths(model, architecture):
        for name, module in get(model, layer.layer).named_modules(prefix=layer.layer):
            owner = owners.setdefault(id(module), name)
            if owner != name and next(module.parameters(), None) is not None:
                raise ModelMismatchError(
                    f"{owner} and {name} are one module, and gates could not tell its layers apart: put "
                    "copy.deepcopy(module) in the place of one (their weights may stay shared)"
                )


def unshare_(model: nn.Module, layers: Iterable[LayerPaths]) -> None:
    """Give every layer modules of its own, in place: those that it shares with another may be cut in another way."""
    seen: set[int] = set()
    for layer in layers:
        for name, module in list(get(model, layer.layer).named_modules(prefix=layer.layer, remove_duplicate=False)):
            if id(module) in seen and next(named_tensors(module), None) is not None:
                put(model, name, copy.deepcopy(module))
            seen.add(id(module))


def check_fits(model: PreTrainedModel, plan: PruningPlan, allow_unchanged: bool) -> None:
    """Refuse a plan made for another shape, or one that changes nothing: InvalidPlanError says what differs."""
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
    """The skeleton that loading makes from the small model's config: on the meta device, without weights."""
    named = named_source(getattr(model.config, "_name_or_path", ""))
    info = {**named, **plan.info, **lineage(model.config, plan)}
    config = config_for(plan.architecture, model.config, info)
    _follow_states(model, config, plan)
    return _skeleton(model, plan.architecture, config)


def _skeleton(model: PreTrainedModel, architecture: Architecture, config: Any = None) -> PreTrainedModel:
    """The pruned twin of the stock class behind a model, on the meta device."""
    config = config_for(architecture, model.config) if config is None else config
    with torch.device("meta"):
        skeleton = pruned_model_class(stock_ancestor(type(model)))(config)
    prefix = architecture.family.encoder_path(model)
    if getattr(model.get_submodule(prefix.rstrip(".")), "pooler", 0) is None:
        encoder: Any = skeleton.get_submodule(prefix.rstrip("."))
        encoder.pooler = None  # a base model made without its pooling layer
    return skeleton


def _follow_states(model: PreTrainedModel, config: Any, plan: PruningPlan) -> None:
    """Numbers by which a model reads hidden states follow the layers."""
    source = plan.source
    states = source.family.read_states(model.config, source.task, len(source.layers))
    position = {entry.index: j for j, entry in enumerate(plan.layers)}
    lost = [state - 1 for state in states if state and state - 1 not in position]
    if lost:
        raise InvalidPlanError(f"the plan removes layer {lost[0]}, whose output this model reads (out_features)")
    if states:
        kept = [position[state - 1] + 1 if state else 0 for state in states]
        source.family.name_states(config, source.task, kept)
