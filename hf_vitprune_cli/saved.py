"""Models by folder or Hub id: their configs, classes and architectures, without their weights."""

from __future__ import annotations

from pathlib import Path

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_vitprune.errors import UnsupportedModelError
from hf_vitprune.families import PRUNED_PREFIX, family_of
from hf_vitprune.modeling import class_for_task, pruned_model_class, registry, stock_model_class
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.configs import strip_family

from .app import one_line


def load_config(model: str) -> PreTrainedConfig:
    """The config of a saved model, stock or pruned.

    Raises:
        OSError: there is no such model, or no config in it.
        UnsupportedModelError: transformers or this library does not know its kind.
    """
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"{model} has no config.json, so it is not the folder of a saved model")
    if not Path(model).exists() and (model.count("/") > 1 or model.startswith(("/", ".", "~"))):
        raise FileNotFoundError(f"there is no folder {model}")
    try:
        config = AutoConfig.from_pretrained(model)
    except (ValueError, StrictDataclassError) as error:  # an unknown or absent model_type, fields of a wrong type
        raise UnsupportedModelError(f"{model}: {one_line(error)}") from error
    family_of(config)
    return config


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names in ``architectures``, by default its image classifier.

    Raises:
        UnsupportedModelError: the class is not of a family, or holds a text tower too.
    """
    family = family_of(config)
    named: str | None = next(iter(config.architectures or []), None)
    if named in family.refused_classes:
        raise UnsupportedModelError(
            f"{named} holds a text tower too; save its vision tower on its own, or use a vision-only task class"
        )
    is_pruned = config.model_type.startswith(PRUNED_PREFIX)
    if named is None:
        default = class_for_task(family, "ForImageClassification")
        return default if is_pruned else stock_model_class(default)
    found: type[PreTrainedModel] | None = getattr(registry if is_pruned else transformers, named, None)
    if found is None:
        raise UnsupportedModelError(f"config.json names {named}, which is no class of {config.model_type}")
    return found


def load_architecture(model: str) -> Architecture:
    """The architecture of a saved model, from its config alone."""
    config = load_config(model)
    model_class = pruned_model_class(model_class_of(config))
    task = getattr(model_class, "pruning_task", None) or strip_family(model_class.__name__, type(config).__name__)
    return Architecture.from_config(config, task)
