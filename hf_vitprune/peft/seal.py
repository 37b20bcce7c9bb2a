"""Adapters that PEFT's own calls put on a pruned model: their configs take the record of that model along.

``get_peft_model(pruned, LoraConfig(...))`` makes a LORA adapter, which any model with layers of the targets' sizes
would take. What is saved is of type VITPRUNE_LORA instead. Nothing in PEFT is changed for this: PEFT stores the
configs on the base model, and a pruned model seals what is stored there.
"""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftType
from torch import nn

from ..errors import AdapterError
from ..modeling.peft_twin import plain_twin
from ..modeling.pretrained import PrunedModelMixin
from ..plan.lineage import lineage_of
from .folder import remember
from .kinds.kind import PREFIX, kind_of
from .record import pruning_record
from .types import pruned_config_class


def pruned_adapter_config(model: nn.Module, config: Any) -> Any:
    """The config of an adapter that loads onto this pruned model only, for ``get_peft_model`` or ``add_adapter``.

    Models of a Pruned class do this by themselves, and so do models of a stock class as long as they are the ones
    that ``prune`` gave, or a ``PruningTrainer`` trains. Nothing tells PEFT that a model of a stock class was pruned
    before it was loaded: use this function, or ``save_pruned_peft`` at the end.

    Args:
        model: the pruned model.
        config: of LoRA or another method that works in layers; it stays as it is.

    Raises:
        AdapterError: the model is not pruned, or the method has no type for pruned models.
    """
    made = copy.copy(config)
    seal(made, model)
    return made


def seal(config: Any, model: nn.Module) -> None:
    """Turn a config into that of an adapter of this pruned model, in place.

    A dense checkpoint cannot stand in for the base: it may have been trained since it was pruned.
    """
    if "plan" not in lineage_of(model.config):  # type: ignore[arg-type]
        raise AdapterError(f"this {type(model).__name__} is not pruned; use the adapter's config as it is")
    kind = kind_of(config).name
    config.__class__ = pruned_config_class(kind)
    config.peft_type = PeftType(PREFIX + kind)
    config.pruning = pruning_record(plain_twin(model), altered=True)


def seal_all(model: Any, *_: Any) -> None:
    """Seal every adapter's config that a pruned model holds, in place; a state dict's pre-hook."""
    for config in model.__dict__.get("peft_config", {}).values():
        if not hasattr(config, "pruning") and "plan" in lineage_of(model.config):
            seal(config, model)
    remember(model)


def seal_on_saving(model: nn.Module) -> None:
    """Have the adapters sealed that PEFT will put on a pruned model of a stock class, whenever they are saved."""
    if "plan" in lineage_of(model.config) and seal_all not in model._state_dict_pre_hooks.values():  # type: ignore[arg-type]
        model.register_state_dict_pre_hook(seal_all)


class SealedConfigs:
    """``peft_config`` of models of Pruned classes. PEFT sets it when the first adapter is put in."""

    def __get__(self, model: Any, owner: Any = None) -> Any:
        if model is None:
            return self
        if "peft_config" not in model.__dict__:
            raise AttributeError(f"{type(model).__name__} has no attribute 'peft_config'")
        return model.__dict__["peft_config"]

    def __set__(self, model: Any, configs: dict[str, Any]) -> None:
        new = "peft_config" not in model.__dict__
        for name, config in configs.items():
            if not hasattr(config, "pruning"):
                configs[name] = copy.copy(config)  # the caller may use its config for another model
        model.__dict__["peft_config"] = configs
        seal_all(model)
        if new:  # adapters that are added later go into the dict unseen, and are sealed before anything is saved
            model.register_state_dict_pre_hook(seal_all)

    def __delete__(self, model: Any) -> None:
        if model.__dict__.pop("peft_config", None) is None:
            raise AttributeError(f"{type(model).__name__} has no attribute 'peft_config'")


PrunedModelMixin.peft_config = SealedConfigs()  # type: ignore[attr-defined]
