"""Adapters that PEFT's own calls put on a pruned model: their configs take the record of that model along.

``get_peft_model(pruned, LoraConfig(...))`` makes a LORA adapter, which any model with layers of the targets' sizes
would take. What is saved is of type VITPRUNE_LORA instead. Nothing in PEFT is changed for this: PEFT stores the
configs on the base model, and a pruned model seals what is stored there. One of a stock class, which may have been
loaded, is known as pruned by its config; torch tells when a tuner takes it.
"""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from ..errors import AdapterError
from ..modeling.peft_twin import plain_twin
from ..modeling.pretrained import PrunedModelMixin
from ..plan.lineage import lineage_of
from ..spec.towers import towers
from .folder import remember
from .kinds.kind import PREFIX, kind_of
from .record import pruning_record
from .types import pruned_config_class


def pruned_adapter_config(model: nn.Module, config: Any) -> Any:
    """The config of an adapter that loads onto this pruned model only, for ``get_peft_model`` or ``add_adapter``.

    Pruned models do this by themselves where this library was imported before the adapter was put on.

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
    part = pruned_part(model)
    if part is None:
        raise AdapterError(f"this {type(model).__name__} is not pruned; use the adapter's config as it is")
    kind = kind_of(config).name
    config.__class__ = pruned_config_class(kind)
    config.peft_type = PeftType(PREFIX + kind)
    config.pruning = pruning_record(plain_twin(model, part=part), altered=True, part=part)


def pruned_part(model: Any) -> str | None:
    """Path of the pruned tower in a model, of the first one if there are several; None where nothing is pruned."""
    if "plan" in lineage_of(model.config):
        return ""
    paths = [tower.path for tower in towers(model).values()]
    return next((path for path in paths if "plan" in lineage_of(model.get_submodule(path).config)), None)


def seal_all(model: Any, *_: Any) -> None:
    """Seal every adapter's config that a pruned model holds; a state dict's pre-hook.

    In place, as PEFT saves what it has looked up before; transformers looks up later, and gets copies.
    """
    configs = model.__dict__.get("peft_config", {})
    for name, config in configs.items():
        if not hasattr(config, "pruning") and pruned_part(model) is not None:
            if getattr(model, "_hf_peft_config_loaded", False):
                configs[name] = config = copy.copy(config)
            seal(config, model)
    remember(model)


def seal_on_saving(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Have the adapters sealed, whenever they are saved, on pruned models of stock classes and around pruned towers.

    torch calls this for every module that is set as an attribute: a tuner sets the model that it puts adapters in, and
    a PeftModel the tuner, with the caller's config, which may serve for other models.
    """
    if isinstance(parent, BaseTuner) and isinstance(module, PreTrainedModel):
        if pruned_part(module) is not None and not _is_watched(module):
            module.register_state_dict_pre_hook(seal_all)
    elif (
        isinstance(parent, PeftModel) and isinstance(module, BaseTuner) and _is_watched(getattr(module, "model", None))
    ):
        unsealed = {key: config for key, config in module.peft_config.items() if not hasattr(config, "pruning")}
        module.peft_config.update({key: copy.copy(config) for key, config in unsealed.items()})


def _is_watched(model: nn.Module | None) -> bool:
    return model is not None and seal_all in model._state_dict_pre_hooks.values()


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
register_module_module_registration_hook(seal_on_saving)
