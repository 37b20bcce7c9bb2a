"""Generates and registers Pruned<X>Config and Pruned<X>... for every class the Auto classes map for a family."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import InvalidArchitectureError, UnsupportedModelError
from ..families import PRUNED_PREFIX, Family, add_family, all_families, remove_family
from ..spec.architecture import Architecture, write_record
from ..spec.configs import stock_config, strip_family
from .pretrained import PrunedModelMixin
from .pruned_config import PrunedConfigMixin, forget_models, make_models, when_used

#: Auto classes whose stock classes get a pruned twin
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForMaskedImageModeling",
    "AutoModelForPreTraining",
    "AutoModelForSemanticSegmentation",
    "AutoModelForTextEncoding",
    "AutoModelForVideoClassification",
    "AutoBackbone",
)
#: classes that no Auto class maps, by family
UNMAPPED = {
    "beit": ("BeitForMaskedImageModeling",),
    "clip_vision_model": ("CLIPVisionModelWithProjection",),
    "clip_text_model": ("CLIPTextModelWithProjection",),
    "siglip_text_model": ("SiglipTextModel",),
    "siglip2_text_model": ("Siglip2TextModel",),
}

_configs: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}
#: every class -> its pruned twin, those of users included
_models: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}
#: the classes of transformers among them
_stock: set[type[PreTrainedModel]] = set()


def register_family(family: Family) -> None:
    """Take in a family untested; see ``family_check.register_family``."""
    add_family(family)
    _make_config_class(family)


def stock_classes(family: Family) -> list[type[PreTrainedModel]]:
    """The classes of transformers that a registered family prunes."""
    config_class = CONFIG_MAPPING[family.model_type]
    make_models(_configs[config_class])
    return [stock for stock in _models if stock in _stock and stock.config_class is config_class]


def forget_family(family: Family) -> None:
    """Undo :func:`register_family`."""
    remove_family(family)
    config_class = CONFIG_MAPPING[family.model_type]
    forget_models(_configs.pop(config_class))
    for stock in [one for one in _stock if one.config_class is config_class]:
        _stock.remove(stock)
        del _models[stock]


def pruned_config_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    return _configs[config_class]


def pruned_model_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The pruned twin of a stock class; a pruned class is its own; UnsupportedModelError if no Auto class maps it."""
    if issubclass(model_class, PrunedModelMixin):
        return model_class
    stock = stock_ancestor(model_class)
    if model_class not in _models:  # written by a user: its own twin, with its own forward
        parent = _models[stock]
        body = {name: parent.__dict__[name] for name in ("config_class", "config", "pruning_task")}
        body |= {"auto_classes": (), "dense_class": model_class, "__module__": model_class.__module__}
        name = f"Pruned{model_class.__name__}"
        _models[model_class] = type(name, (PrunedModelMixin, model_class), body)
        copy_conversions(name, parent.__name__)
    return _models[model_class]


def stock_ancestor(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers that a class is or inherits from; for a pruned class, of the dense one."""
    for config_class in getattr(getattr(model_class, "config_class", None), "__mro__", ()):
        if config_class in _configs:
            make_models(_configs[config_class])
    for known in model_class.__mro__:
        if known in _stock:
            return known
    known_types = ", ".join(sorted(family.model_type for family in all_families()))
    raise UnsupportedModelError(f"{model_class.__name__} has no pruned class; known model types: {known_types}")


def stock_model_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Inverse of :func:`pruned_model_class`."""
    return next((stock for stock, pruned in _models.items() if pruned is model_class), model_class)


def class_for_task(family: Family, task: str) -> type[PreTrainedModel]:
    """The pruned class of a family for a task suffix such as ``"ForImageClassification"``."""
    for stock in stock_classes(family):
        if _models[stock].pruning_task == task:  # type: ignore[attr-defined]
            return _models[stock]
    raise UnsupportedModelError(f"{family.model_type} has no class for {task!r}")


def _make_config_class(family: Family) -> None:
    config_class = CONFIG_MAPPING[family.model_type]
    pruned_type = PRUNED_PREFIX + family.model_type
    pruned_config = _new_class(
        f"Pruned{config_class.__name__}",
        (PrunedConfigMixin, config_class),
        {"model_type": pruned_type, "__annotations__": {"pruning_config": Any}, "pruning_config": None},
    )
    _configs[config_class] = pruned_config
    AutoConfig.register(pruned_type, pruned_config, exist_ok=True)  # a family may have been refused before
    when_used(pruned_config, lambda: _make_model_classes(family, config_class))


def _make_model_classes(family: Family, config_class: type[PreTrainedConfig]) -> None:
    pruned_config = _configs[config_class]
    copy_conversions(pruned_config.model_type, family.model_type)
    found: list[tuple[str, type[PreTrainedModel]]] = [
        (auto_name, stock)
        for auto_name in AUTO_CLASSES
        for stock in _mapped(auto_name, config_class)
        if stock.__name__ not in family.refused_classes
    ]
    found += [("", getattr(transformers, name)) for name in UNMAPPED.get(family.model_type, ())]
    for auto_name, stock in found:
        _stock.add(stock)
        if stock not in _models:
            body = {"config_class": pruned_config, "config": pruned_config, "auto_classes": (), "dense_class": stock}
            body["pruning_task"] = strip_family(stock.__name__, config_class.__name__)
            body |= family.twin_attributes.get(stock.__name__, {})
            _models[stock] = _new_class(f"Pruned{stock.__name__}", (PrunedModelMixin, stock), body)
            copy_conversions(f"Pruned{stock.__name__}", stock.__name__)
        if auto_name:
            _models[stock].auto_classes += (auto_name,)  # type: ignore[attr-defined]
            classes: Any = (*_mapped(auto_name, pruned_config), _models[stock])
            mapping = getattr(transformers, auto_name)._model_mapping
            mapping.register(pruned_config, classes if len(classes) > 1 else classes[0], exist_ok=True)


def _mapped(auto_name: str, config_class: type) -> tuple[type[PreTrainedModel], ...]:
    classes = getattr(transformers, auto_name)._model_mapping.get(config_class, ())
    return classes if isinstance(classes, tuple) else (classes,)


def _new_class(name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
    made = type(name, bases, {"__module__": __name__, "__qualname__": name, **body})
    globals()[name] = made
    return made


def copy_conversions(name: str, source: str) -> None:
    """Renames of old checkpoint keys are looked up by class name and model type; subclasses lose them otherwise."""
    mapping = get_checkpoint_conversion_mapping(source)
    if mapping:
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


for _family in all_families():
    _make_config_class(_family)


def __getattr__(name: str) -> Any:
    # a model class: made when asked for
    stock = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    config_class = getattr(stock, "config_class", None)
    if config_class in _configs:
        make_models(_configs[config_class])
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def config_for(
    architecture: Architecture, config: PreTrainedConfig | None = None, info: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """The Pruned<X>Config of an architecture.

    Args:
        config: of the model it is made from, for labels and whatever else users keep there; by default the dense one.
        info: how the shape was found; kept in the record, outside its fingerprint.
    """
    architecture.validated()
    base = architecture.config if config is None else config
    family = architecture.family
    made = pruned_config_class(type(architecture.config))(**carried_fields(base))
    family.resize_config(made, architecture.hidden_size, len(architecture.layers), architecture.depths)
    made.pruning_config = write_record(architecture, info)
    made._attn_implementation = base._attn_implementation
    return made


def carried_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a config, but for those that one of another kind makes itself, or must not have."""
    fields = config.to_dict()
    for name in ("model_type", "architectures", "auto_map", "transformers_version", "pruning_config", "pruning_info"):
        fields.pop(name, None)
    if fields.pop("stage_names", None):
        fields.pop("out_indices", None)  # they follow from out_features, and these from the depth
    return fields


def build(base_config: PreTrainedConfig, architecture: Architecture) -> PreTrainedModel:
    """An untrained pruned model: ``Pruned<X>ForImageClassification`` (or the architecture's own task class).

    Args:
        base_config: stock config; gives labels, image size, dropout. Its family must be the architecture's.
        architecture: the shape.

    Raises:
        InvalidArchitectureError: the two are of different families, or the shape is impossible.
    """
    stock = stock_config(base_config)
    if stock.model_type != architecture.model_type:
        raise InvalidArchitectureError(
            f"the config is of {stock.model_type!r}, the architecture of {architecture.model_type!r}"
        )
    config = config_for(architecture, stock)
    return class_for_task(architecture.family, architecture.task)(config)
