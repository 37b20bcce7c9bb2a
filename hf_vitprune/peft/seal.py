"""Adapters that PEFT's own calls put on a pruned model: their configs take the record of that model along.

``get_peft_model(pruned, LoraConfig(...))`` makes a LORA adapter, which any model with layers of the targets' sizes
would take. What is saved is of type VITPRUNE_LORA instead. Nothing in PEFT is changed for this: torch tells when a
tuner takes a model, a pruned one is known by its config, and what is about to be saved of it is sealed.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from ..errors import AdapterError
from ..modeling.peft_twin import plain_twin
from ..plan.lineage import lineage_of
from ..spec.towers import towers
from .folder import BASE_FOLDER, ELSEWHERE, remember, watch
from .kinds.kind import PREFIX, kind_of
from .record import pruning_record
from .types import pruned_config_class


def pruned_adapter_config(model: nn.Module, config: Any) -> Any:
    """The config of an adapter that loads onto this pruned model only, for ``get_peft_model`` or ``add_adapter``.

    Pruned models do this by themselves where this library was imported before the adapter was put on. ``config``, of a
    method that works in layers, stays as it is.

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


class OwnConfigs(dict[str, Any]):
    """Configs of the adapters of a PeftModel, copied as they come in: the caller may use its own for other models."""

    def __init__(self, configs: dict[str, Any]) -> None:
        for name, config in configs.items():
            self[name] = config

    def __setitem__(self, name: str, config: Any) -> None:
        super().__setitem__(name, config if hasattr(config, "pruning") else copy.copy(config))


def seal_on_saving(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Have the adapters of a pruned model, or around a pruned tower, sealed whenever they are saved.

    torch calls this for every module that is set as an attribute: a tuner sets the model that it puts adapters in, and
    a PeftModel the tuner, with the caller's config.
    """
    if isinstance(parent, BaseTuner) and isinstance(module, PreTrainedModel):
        if pruned_part(module) is not None and not _is_watched(module):
            module.register_state_dict_pre_hook(seal_all)
    elif isinstance(parent, PeftModel) and isinstance(module, BaseTuner):
        model = getattr(module, "model", None)
        if _is_watched(model):
            module.peft_config = model.peft_config = OwnConfigs(module.peft_config)  # type: ignore[union-attr]


def _is_watched(model: nn.Module | None) -> bool:
    return model is not None and seal_all in model._state_dict_pre_hooks.values()


def save_pruned_peft(
    model: Any, folder: str | Path, base: str | None = None, always_base: bool = False
) -> Path | None:
    """Save the adapters of a pruned PeftModel, and its base where no existing checkpoint can stand in for it.

    ``model.save_pretrained(folder)`` does the same for models that ``prune`` has made. Where just layers were removed,
    the dense checkpoint named in the adapter's config is cut down on loading; otherwise (``always_base``, or where
    none is named) the pruned base goes into ``folder/base``, and the folder may be moved and loaded by its own name.

    Args:
        model: a PeftModel over a pruned model, from ``prune`` or ``get_peft_model``.
        folder: made where it does not exist.
        base: name or path of the pruned base where it was saved or pushed already; nothing but its name is written,
            by later calls of ``model.save_pretrained`` either.

    Returns:
        The folder of the base, None where none was written.

    Raises:
        AdapterError: the model holds no adapters, or is not pruned.
        NotFiniteError: there are weights that are not finite.
    """
    configs = getattr(model, "peft_config", {})
    unsealed = [name for name, config in configs.items() if not hasattr(config, "pruning")]
    if not configs or (unsealed and pruned_part(model.get_base_model()) is None):
        raise AdapterError("not a PeftModel over a pruned model; save it with its own save_pretrained")
    for name in unsealed:
        configs[name] = pruned_adapter_config(model.get_base_model(), configs[name])
    for config in configs.values():
        if base is not None:
            config.base_model_name_or_path, config.revision = base, None
            config.pruning = {**config.pruning, "base": ELSEWHERE}
        elif always_base or not config.base_model_name_or_path:
            config.pruning = {**config.pruning, "base": BASE_FOLDER}
    watch(model.get_base_model())
    model.save_pretrained(str(folder))
    written = Path(folder) / BASE_FOLDER
    return None if base is not None or not written.is_dir() else written


register_module_module_registration_hook(seal_on_saving)
