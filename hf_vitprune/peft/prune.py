"""A PeftModel and a plan -> a PeftModel over the pruned base, its adapters sliced with it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from ..errors import AdapterError, UnsupportedUnitError
from ..modeling.peft_twin import check_peft_model, merged_twin, peft_model_in, plain_twin, saved_modules, tuner_layers
from ..plan.plan import PruningPlan
from ..spec.towers import find_tower
from ..surgery.composite import with_tower
from ..surgery.cuts import Cut, find_cuts
from ..surgery.transplant import check_fits, prune_plain, resized_copy
from .absorb import absorb, active_of, verify_layer
from .decide import Decision, altered_weights, cuts_with_tower, decide, new_names, shared_tensors, under
from .kinds import kind_of
from .kinds.kind import adapter_tensors
from .record import pruning_record
from .types import lora_config, pruned_config

logger = logging.getLogger(__name__)


def prune_peft(
    model: Any,
    plan: PruningPlan,
    *,
    allow_unchanged: bool = False,
    part: str = "",
    feature_layers: dict[str, Any] | None = None,
) -> Any:
    """Prune a PeftModel: same outputs as ``mask(model, plan)``, adapters still trainable where they can be sliced.

    docs/peft.md says which types are sliced, become LoRA, or are merged into the weights, with a warning and a note in
    the base config's record. New weights of the plan (compensation) are those with the active adapters: the weight
    under what is sliced becomes the new one less the adapter's part of it.

    Args:
        plan: for the base of the PeftModel, or for the tower at ``part``.
        allow_unchanged: accept a plan that removes nothing.
        part: path, in the base model, of the tower that the plan is for; adapters elsewhere stay as they are, and the
            weights there are shared with the model.
        feature_layers: fields of the base model's config that say which of the tower's layers it reads.

    Returns:
        A PeftModel of the same class with adapters of type ``VITPRUNE_<TYPE>`` under the same names; the plain pruned
        model where nothing is left of the adapters.

    Raises:
        AdapterError: an adapter can be neither sliced nor merged.
        InvalidPlanError: the plan is for another architecture, or removes nothing.
        UnsupportedUnitError: the plan narrows what the model around the tower reads.
    """
    model = peft_model_in(model)
    check_peft_model(model)
    configs = dict(model.peft_config)
    for config in configs.values():
        kind_of(config).check_config(config)
    base = model.get_base_model()
    if part and plan.embedding is not None:
        raise UnsupportedUnitError(
            f"the plan narrows the embedding of {part}, and the model around it, which has adapters, reads that; "
            "leave 'embedding' out of its units"
        )
    stock = plain_twin(base, part=part)
    tower = stock.get_submodule(part)
    check_fits(tower, plan, allow_unchanged)
    cuts = cuts_with_tower(stock, find_cuts(tower, resized_copy(tower, plan), plan), part)
    plan_here = replace(plan, weights={under(part, name): tensor for name, tensor in plan.weights.items()})
    decision = decide(model, stock, plan_here, cuts, part)
    altered = altered_weights(base, stock, configs, decision)
    whole = plain_twin(base, decision.merged, part=part)
    small_tower = prune_plain(
        whole.get_submodule(part), replace(plan, info={**plan.info, **altered}), allow_unchanged=allow_unchanged
    )
    small = small_tower
    if part:
        width = plan.source.hidden_size
        small = with_tower(whole, find_tower(whole, part), small_tower, width, None, feature_layers)
    flags = [(parameter, parameter.requires_grad) for parameter in small.parameters()]

    if decision.kind.name != kind_of(next(iter(configs.values()))).name:
        layers = {carried.old: carried.tensors for carried in decision.carried}
        configs = {name: lora_config(config, layers, name) for name, config in configs.items()}
    names = new_names(cuts)
    wrappers = {names[old]: wrapper for old, wrapper in saved_modules(base).items() if old in names}
    record = pruning_record(small, altered=bool(altered), part=part)
    made = _new_configs(configs, decision, wrappers, record)
    if not made:
        logger.warning("nothing is left of the adapters (all merged or on removed layers): this is a plain model")
        return small.train(model.training)
    try:
        result = _inject(model, small, made)
        _fill_layers(result, decision, made)
        _fill_weights(result, model, plan, decision, part)
        _fill_wrappers(result, wrappers, cuts, plan_here)
        _copy_shared(model, result, decision)
        _activate(model, result)
    finally:  # PEFT freezes what it wraps, and what lies outside of a tower is the model's own
        for parameter, trained in flags:
            parameter.requires_grad_(trained)
    _copy_flags(result, decision, wrappers)
    return result.train(model.training)


def _new_configs(
    configs: dict[str, Any], decision: Decision, wrappers: dict[str, Any], record: dict[str, Any]
) -> dict[str, Any]:
    made = {}
    for adapter, config in configs.items():
        mine = [c for c in decision.carried if adapter in c.layer._get_available_adapters()]
        saved = [new for new, wrapper in wrappers.items() if adapter in wrapper.modules_to_save]
        if mine or saved:
            made[adapter] = pruned_config(config, {c.new: (c.old, c.layer) for c in mine}, saved, record)
        else:
            logger.warning("adapter %r is dropped: all its layers are removed or merged", adapter)
    return made


def _inject(model: Any, small: Any, configs: dict[str, Any]) -> Any:
    """New adapters of the right shapes, with weights that are overwritten next."""
    names = list(configs)
    with torch.random.fork_rng(devices=[]):
        result = type(model)(small, configs[names[0]], names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            result.add_adapter(name, configs[name], autocast_adapter_dtype=False)
    return result


def _fill_layers(result: Any, decision: Decision, configs: dict[str, Any]) -> None:
    made: dict[str, Any] = dict(tuner_layers(result.get_base_model()))
    places = {(layer, name): t for layer, module in made.items() for name, t in adapter_tensors(module).items()}
    tensors = {
        (carried.new, name): decision.kind.finished(tensor, name, carried.new, configs)
        for carried in decision.carried
        for name, (tensor, _) in carried.tensors.items()
    }
    shapes, wanted = ({(*place, tuple(t.shape)) for place, t in both.items()} for both in (places, tensors))
    if shapes != wanted:
        raise AdapterError(
            f"PEFT made {sorted(shapes - wanted)[:3]} where the old adapters have {sorted(wanted - shapes)[:3]}; "
            "please report this, and prune model.merge_and_unload() meanwhile"
        )
    for place, tensor in tensors.items():
        places[place].data = tensor
    for carried in decision.carried:
        layer, old = made[carried.new], carried.layer
        adapters = [name for name in configs if name in old._get_available_adapters()]
        scaling = getattr(layer, "scaling", None)
        if type(old) is type(layer) and isinstance(scaling, dict):
            scaling.update({name: old.scaling[name] for name in adapters if name in scaling})  # type: ignore
        if not carried.absorbs:
            verify_layer(carried.old, old, layer, adapters, carried.cut)


def _fill_weights(result: Any, model: Any, plan: PruningPlan, decision: Decision, part: str) -> None:
    """The plan's new weights are those of layers and adapters together."""
    absorbing = [carried for carried in decision.carried if carried.absorbs]
    if absorbing:
        made = tuner_layers(result.get_base_model())
        effective = prune_plain(merged_twin(model, part).get_submodule(part), plan, allow_unchanged=True)
        for one in absorbing:
            new = effective.get_submodule(one.new.removeprefix(under(part, "")))
            absorb(decision.kind, one.new, made[one.new], active_of(one.layer), new)


def _fill_wrappers(result: Any, wrappers: dict[str, Any], cuts: dict[str, Cut], plan: PruningPlan) -> None:
    made = saved_modules(result.get_base_model())
    for new, old in wrappers.items():
        for adapter, module in made[new].modules_to_save.items():
            if adapter in old.modules_to_save:
                source = old.modules_to_save[adapter].state_dict()
                for inner, place in module.state_dict().items():
                    value = plan.weights.get(f"{new}.{inner}")
                    place.copy_(cuts[f"{new}.{inner}"].take(source[inner]) if value is None else value)


def _copy_shared(model: Any, result: Any, decision: Decision) -> None:
    """Tensors that a tuner keeps once for all its layers."""
    if decision.kind.name != kind_of(next(iter(model.peft_config.values()))).name:
        return
    own = shared_tensors(model)
    for name, tensor in shared_tensors(result).items():
        if name not in own or own[name].shape != tensor.shape:
            raise AdapterError(f"{name}, shared by all layers of the adapter, cannot be carried over; merge it first")
        tensor.data.copy_(own[name])


def _activate(model: Any, result: Any) -> None:
    active = [name for name in model.base_model.active_adapters if name in result.peft_config]
    if not active:
        logger.warning("the active adapter is gone; %r is active now", result.active_adapter)
        return
    if model.active_adapter in active:
        result.active_adapter = model.active_adapter
    result.base_model.set_adapter(active[0] if len(active) == 1 else active)


def _copy_flags(result: Any, decision: Decision, wrappers: dict[str, Any]) -> None:
    """Which adapter tensors are trained, whatever PEFT made of it."""
    made = tuner_layers(result.get_base_model())
    for carried in decision.carried:
        places = adapter_tensors(made[carried.new])  # type: ignore[arg-type]
        for name, (_, trained) in carried.tensors.items():
            if places[name].requires_grad != trained:
                places[name].requires_grad_(trained)
    saved = saved_modules(result.get_base_model())
    for new, old in wrappers.items():
        for adapter, module in saved[new].modules_to_save.items():
            flags = {n: p.requires_grad for n, p in old.modules_to_save[adapter].named_parameters()}
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(flags.get(name, parameter.requires_grad))
