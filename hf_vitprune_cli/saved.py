"""Models by folder or Hub id: their configs, classes and architectures; and whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import AutoPeftModel, PeftConfig, PeftModel
from transformers import AutoConfig, AutoImageProcessor, PreTrainedConfig, PreTrainedModel

from hf_vitprune.errors import InvalidConfigError, UnsupportedModelError
from hf_vitprune.evaluation.results import results_of
from hf_vitprune.families import PRUNED_PREFIX, family_of, find_family
from hf_vitprune.modeling import class_for_task, hosts, registry, stock_model_class
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.towers import tower_module

from .app import one_line


def load_any_config(model: str) -> PreTrainedConfig:
    """The config of a saved model, stock or pruned, of a family or with towers in it.

    Raises:
        OSError: there is no such model, or no config in it.
        UnsupportedModelError: transformers does not know its kind.
    """
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"{model} has no config.json, so it is not the folder of a saved model")
    if not Path(model).exists() and (model.count("/") > 1 or model.startswith(("/", ".", "~"))):
        raise FileNotFoundError(f"there is no folder {model}")
    try:
        return AutoConfig.from_pretrained(model)
    except (ValueError, StrictDataclassError) as error:  # an unknown or absent model_type, fields of a wrong type
        raise UnsupportedModelError(f"{model}: {one_line(error)}") from error


def load_config(model: str) -> PreTrainedConfig:
    """:func:`load_any_config`, of a family alone.

    Raises:
        UnsupportedModelError: the model is of none, or holds towers.
    """
    config = load_any_config(model)
    family_of(config)
    if holds_towers(config):
        raise UnsupportedModelError(
            f"{model} is a {next(iter(config.architectures or []))}, which holds several encoders: this command is "
            "for models that are pruned as a whole (inspect, prune, report and card take --part)"
        )
    return config


def holds_towers(config: PreTrainedConfig) -> bool:
    """Whether a config is of a bigger model, whose class is none of a family."""
    family = find_family(config)
    return family is None or next(iter(config.architectures or []), None) in family.refused_classes


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names in ``architectures``, by default its image classifier.

    Raises:
        UnsupportedModelError: it names none, or one that is not of its kind.
    """
    named: str = next(iter(config.architectures or []), "")
    is_pruned = config.model_type.startswith(PRUNED_PREFIX)
    found: type[PreTrainedModel] | None
    if holds_towers(config):
        found = getattr(hosts, named, getattr(transformers, named, None))
        if found is None:
            family_of(config)  # says what is supported
    elif not named:
        found = class_for_task(family_of(config), "ForImageClassification")
        found = found if is_pruned else stock_model_class(found)
    else:
        found = getattr(registry if is_pruned else transformers, named, None)
    if found is None:
        raise UnsupportedModelError(f"config.json names {named or None}, which is no class of {config.model_type}")
    return found


# ---------------------------------------------------------------------- without weights
def load_skeleton(model: str) -> Any:
    """A saved model without its weights; of adapters without a config beside them, with those of their base."""
    if is_adapter_alone(model):
        return AutoPeftModel.from_pretrained(model)
    config = load_any_config(model)
    with torch.device("meta"):
        return model_class_of(config)(config)


def is_adapter_alone(model: str) -> bool:
    """Whether a folder has adapters, and no config of a whole model."""
    folder = Path(model)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def load_tower(model: str, part: str | None = None) -> tuple[Architecture, PreTrainedConfig]:
    """The architecture of a saved model, or of a tower in it, and its config; weights are not read."""
    load_any_config(model)
    whole = load_skeleton(model)
    return Architecture.of(whole, part), tower_module(whole, part).config


# ---------------------------------------------------------------------- with weights
def load_model(model: str) -> Any:
    """A saved model, in evaluation mode."""
    return model_class_of(load_any_config(model)).from_pretrained(model).eval()


def load_with_adapters(model: str) -> Any:
    """A saved model, or one with a PEFT adapter on it, in evaluation mode."""
    if not (Path(model) / "adapter_config.json").is_file():
        return load_model(model)
    base = PeftConfig.from_pretrained(model).base_model_name_or_path or model
    inside = Path(model) / base
    return PeftModel.from_pretrained(load_with_adapters(str(inside if inside.is_dir() else base)), model)


def load_processor(model: str, needed: bool = True) -> Any:
    """The image processor of a saved model; None where it has none and none is needed.

    Raises:
        InvalidConfigError: it has none that works, and one is needed.
    """
    try:
        return AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        if not needed:
            return None
        raise InvalidConfigError(
            f"{model} has no usable image processor (preprocessor_config.json), which images have to go through: "
            f"{error}"
        ) from error


def saved_metrics(model: str) -> dict[str, float]:
    """What ``hf-vitprune evaluate`` has found of a model's very weights, by names that say on which data."""
    found = results_of(model) or {"metrics": {}}
    return {f"{name.replace('_', ' ')} on {found['data']}": value for name, value in found["metrics"].items()}
