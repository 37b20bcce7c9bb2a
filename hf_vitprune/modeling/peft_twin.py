"""A PEFT-injected transformers model without its adapters: the same tensors under the stock names."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterError
from ..families import family_of
from ..spec.architecture import Architecture, unwrap
from ..spec.towers import find_tower
from ..utils.hooks import ForwardOverride
from ..utils.modules import forget_dispatch
from .structure import finish_mixers


class SwitchedLayers(nn.ModuleList):
    """The layers of a shared backbone, of which a running model sees the first ``visible`` (None: all)."""

    visible: int | None = None

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[: self.visible])


def is_shared(model: nn.Module) -> bool:
    """Whether ``share_backbone`` prepared this model for adapters of several depths."""
    return any(isinstance(module, SwitchedLayers) for module in model.modules())


def is_peft(model: Any) -> bool:
    """True for a PeftModel; AdapterError for a plain model with adapters in its layers (``load_adapter``)."""
    wrapped = isinstance(model, nn.Module) and hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    if not wrapped and getattr(model, "_hf_peft_config_loaded", False):
        raise AdapterError(
            "the model holds adapters from add_adapter or load_adapter; load them with "
            "peft.PeftModel.from_pretrained(base, adapter) instead, which can be pruned"
        )
    return wrapped


def check_peft_model(model: Any) -> None:
    """Refuse what is no set of adapters in the layers, or is in a state that cannot be carried over (AdapterError)."""
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        kind = getattr(getattr(model, "peft_type", None), "value", type(model).__name__)
        raise AdapterError(
            f"{kind} adapters do not sit in the layers of the model, so they cannot be pruned with it; prune the base "
            "model and adapt the small one"
        )
    if is_shared(model.get_base_model()):
        raise AdapterError(
            "the layers of a shared backbone belong to the adapters of several tasks; load the adapter into a base "
            "model of its own, and prune that"
        )
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise AdapterError(f"the adapters of {name} are merged into its weights; call unmerge_adapter() first")
        if module.disable_adapters:
            raise AdapterError(f"the adapters of {name} are disabled; call base_model.enable_adapter_layers() first")
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise AdapterError(f"{type(module).__name__} at {name} cannot be carried over to a pruned model")
        if type(module).__name__ in ("ParamWrapper", "MultiheadAttention"):
            raise AdapterError(
                f"an adapter on {name} is tied to bare parameters, not to a Linear; merge_and_unload() the model "
                "first, or target Linears only"
            )


def peft_model_in(model: Any) -> Any:
    """The PeftModel inside a PruningModel, or the model itself."""
    inner = getattr(model, "model", None)
    return inner if not isinstance(model, PeftModel) and isinstance(inner, PeftModel) else model


def plain_twin(base: nn.Module, merged: Collection[str] = (), saved: bool = False, part: str = "") -> Any:
    """The stock structure of ``peft_model.get_base_model()``, sharing its tensors; the model itself is not touched.

    Args:
        merged: names of tuner layers whose active adapters go into (a copy of) their weights.
        saved: True takes the trained copies of ``modules_to_save`` of the active adapter, False the originals.
        part: path of the tower in a bigger model.
    """

    def visit(module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, BaseTunerLayer):
            inner = merged_base_layer(module, name) if name in merged else module.get_base_layer()
            return visit(inner, name)
        if isinstance(module, ModulesToSaveWrapper):
            chosen = [a for a in module.active_adapters if a in module.modules_to_save]
            inner = module.modules_to_save[chosen[0]] if saved and chosen else module.original_module
            return visit(inner, name)
        twin = shadow(module)
        for key, child in module._modules.items():
            twin._modules[key] = None if child is None else visit(child, f"{name}.{key}" if name else key)
        return twin

    twin = visit(base, "")
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        twin.__dict__.pop(attribute, None)
    tower: Any = twin.get_submodule(part)
    finish_mixers(tower, family_of(tower))
    return twin


def merged_twin(model: Any, part: str = "") -> Any:
    """The stock model that computes what a PeftModel does with its active adapters; unchanged tensors are shared."""
    model = peft_model_in(model)
    check_peft_model(model)
    base = model.get_base_model()
    return plain_twin(base, tuner_layers(base).keys(), saved=True, part=part)


def plain_part(model: Any, part: str | None = None) -> tuple[Any, Architecture]:
    """A tower as a plain transformers model that stands for itself, active adapters merged; and its architecture."""
    tower = find_tower(model, part)
    whole = merged_twin(model, part=tower.path) if is_peft(model) else unwrap(model)
    return whole.get_submodule(tower.path), Architecture.of(whole, part)


def tuner_layers(base: nn.Module) -> dict[str, BaseTunerLayer]:
    """Names in the base model (as without adapters) of all layers with adapters."""
    return {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}


def saved_modules(base: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Names in the base model of the modules that adapters train as a whole."""
    return {name: module for name, module in base.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def merged_base_layer(layer: Any, name: str) -> nn.Module:
    """A copy of the layer under the adapters, with those that are active merged into its weights."""
    copied = copy.deepcopy(whole_shadow(layer))
    try:
        copied.merge(safe_merge=True, adapter_names=list(layer.active_adapters))
    except (ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
        raise AdapterError(
            f"the adapter of {name} cannot be merged into its weights ({str(error) or type(layer).__name__}): prune "
            "the base model (unload() gives it), and adapt the small one"
        ) from error
    return copied.get_base_layer()


def shadow(module: nn.Module) -> Any:
    """A shallow copy: own dicts, the same tensors and children, no hooks."""
    twin = copy.copy(module)
    forget_dispatch(twin)
    if isinstance(twin.__dict__.get("forward"), ForwardOverride):
        del twin.forward
    twin.__dict__.pop("_output_capturing_hooks_installed", None)  # transformers' own hooks: it makes them anew
    for name, value in list(twin.__dict__.items()):
        if name.endswith("_hooks") or name.endswith("_hooks_with_kwargs") or name.endswith("_hooks_always_called"):
            twin.__dict__[name] = type(value)()
        elif name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            twin.__dict__[name] = copy.copy(value)
    return twin


def whole_shadow(module: nn.Module) -> Any:
    """:func:`shadow` of a module and of everything below it."""
    twin = shadow(module)
    for key, child in module._modules.items():
        twin._modules[key] = None if child is None else whole_shadow(child)
    return twin
