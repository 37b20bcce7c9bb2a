"""Models by folder or Hub id: their configs, classes and architectures, without their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from peft import AutoPeftModel
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import cached_file

from hf_vitprune.errors import InvalidConfigError, UnsupportedModelError
from hf_vitprune.families import PRUNED_PREFIX, family_of, find_family
from hf_vitprune.modeling import class_for_task, hosts, pruned_model_class, registry, stock_model_class
from hf_vitprune.spec.architecture import Architecture
from hf_vitprune.spec.configs import strip_family
from hf_vitprune.spec.towers import find_tower, tower_module

from .app import one_line


def load_config(model: str) -> PreTrainedConfig:
    """The config of a saved model of a family, stock or pruned.

    Raises:
        OSError: there is no such model, or no config in it.
        UnsupportedModelError: transformers or this library does not know its kind.
    """
    config = load_any_config(model)
    family_of(config)
    if holds_towers(config):
        raise UnsupportedModelError(
            f"{model} is a {next(iter(config.architectures or []))}, which holds several encoders: this command is "
            "for models that are pruned as a whole (inspect, prune, report and card take --part)"
        )
    return config


def load_any_config(model: str) -> PreTrainedConfig:
    """:func:`load_config`, of a bigger model with towers in it too."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"{model} has no config.json, so it is not the folder of a saved model")
    if not Path(model).exists() and (model.count("/") > 1 or model.startswith(("/", ".", "~"))):
        raise FileNotFoundError(f"there is no folder {model}")
    try:
        config = AutoConfig.from_pretrained(model)
    except (ValueError, StrictDataclassError) as error:  # an unknown or absent model_type, fields of a wrong type
        raise UnsupportedModelError(f"{model}: {one_line(error)}") from error
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
    named: str | None = next(iter(config.architectures or []), None)
    if holds_towers(config):
        whole: type[PreTrainedModel] | None = getattr(hosts, named or "", getattr(transformers, named or "", None))
        if whole is None:
            family_of(config)  # says what is supported
            raise UnsupportedModelError(f"config.json names {named}, which is no class of {config.model_type}")
        return whole
    family = family_of(config)
    is_pruned = config.model_type.startswith(PRUNED_PREFIX)
    if named is None:
        default = class_for_task(family, "ForImageClassification")
        return default if is_pruned else stock_model_class(default)
    found: type[PreTrainedModel] | None = getattr(registry if is_pruned else transformers, named, None)
    if found is None:
        raise UnsupportedModelError(f"config.json names {named}, which is no class of {config.model_type}")
    return found


def load_skeleton(model: str) -> Any:
    """A saved model without its weights; of adapters without a config beside them, with those of their base."""
    if is_adapter_alone(model):
        return AutoPeftModel.from_pretrained(model)
    config = load_any_config(model)
    with torch.device("meta"), no_init_weights():
        return model_class_of(config)(config)


def is_adapter_alone(model: str) -> bool:
    """Whether a folder has adapters, and no config of a whole model."""
    folder = Path(model)
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def load_adapted(model: str) -> Any:
    """An image classifier of a folder of adapters, over the base that they name."""
    return transformers.AutoModelForImageClassification.from_pretrained(model).eval()


def load_tower(model: str, part: str | None = None) -> tuple[Architecture, PreTrainedConfig]:
    """The architecture of a saved model, or of a tower in it, and its config; weights are not read.

    Raises:
        UnsupportedModelError: as :func:`hf_vitprune.spec.towers.find_tower`.
    """
    config = load_any_config(model)
    model_class = model_class_of(config)
    if holds_towers(config):
        with torch.device("meta"), no_init_weights():
            whole = model_class(config)
        return Architecture.of(whole, part), tower_module(whole, part).config
    model_class = pruned_model_class(model_class)
    task = getattr(model_class, "pruning_task", None) or strip_family(model_class.__name__, type(config).__name__)
    if part not in (None, "vision"):
        with torch.device("meta"):
            find_tower(pruned_model_class(model_class)(config), part)  # says what there is
    return Architecture.from_config(config, task), config


def load_architecture(model: str, part: str | None = None) -> Architecture:
    """The architecture of a saved model, or of a tower in it, from its config alone."""
    return load_tower(model, part)[0]


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


def load_with_adapters(model: str) -> Any:
    """A saved model, or one with a PEFT adapter on it, with its weights."""
    adapter = Path(model) / "adapter_config.json"
    if not adapter.is_file():
        model_class: Any = model_class_of(load_any_config(model))
        return model_class.from_pretrained(model)
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(model).base_model_name_or_path or model
    inside = Path(model) / base
    base = str(inside if inside.is_dir() else base)
    return PeftModel.from_pretrained(load_with_adapters(base), model)


def on_meta(model: str) -> Any:
    """A saved model without its weights; None for an adapter."""
    return None if (Path(model) / "adapter_config.json").is_file() else load_skeleton(model)


def take_tokenizer(model: str, out: Path) -> None:
    """Save the tokenizer of a saved model, if it has one, with the small one: what reads texts goes on doing so."""
    if cached_file(model, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is not None:
        AutoTokenizer.from_pretrained(model).save_pretrained(out)


def saved_metrics(model: str) -> dict[str, float]:
    """What ``hf-vitprune evaluate`` has found of a model's very weights, by names that say on which data."""
    from hf_vitprune.evaluation.results import results_of

    found = results_of(model) or {"metrics": {}}
    return {f"{name.replace('_', ' ')} on {found['data']}": value for name, value in found["metrics"].items()}
