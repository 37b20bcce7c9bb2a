"""Bigger models that build their towers themselves (CLIP and its kin): twins of theirs that put pruned towers in.

A model that asks the Auto classes for its tower needs none: it stays the stock class, with the pruned tower's config
inside of its own.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import CheckpointMismatchError
from ..families import PRUNED_PREFIX, family_of
from ..utils.modules import put
from .pretrained import PrunedModelMixin
from .pruned_config import FirstUseMixin, make_models, mark_pruned, when_used
from .rebuild import fields_set
from .registry import copy_conversions, pruned_model_class
from .strict import StrictMixin

#: model types of classes that make their towers, or the configs of these, from one class -> the Auto classes that map
#: them
HOSTS: dict[str, dict[str, tuple[str, ...]]] = {
    "clip": {"CLIPModel": ("AutoModel", "AutoModelForZeroShotImageClassification")},
    "siglip": {"SiglipModel": ("AutoModel", "AutoModelForZeroShotImageClassification")},
    "siglip2": {"Siglip2Model": ("AutoModel", "AutoModelForZeroShotImageClassification")},
    "internvl": {
        "InternVLModel": ("AutoModel",),
        "InternVLForConditionalGeneration": ("AutoModelForImageTextToText",),
    },
    "rf_detr": {
        "RfDetrModel": ("AutoModel",),
        "RfDetrForObjectDetection": ("AutoModelForObjectDetection",),
        "RfDetrForInstanceSegmentation": ("AutoModelForInstanceSegmentation",),
    },
}
#: put in front of the model type of a host with a pruned tower
HOST_PREFIX = f"{PRUNED_PREFIX}tower_"

_configs: dict[str, type[PreTrainedConfig]] = {}
_hosts: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}


class PrunedHostConfigMixin(FirstUseMixin):
    """A config whose parts may be those of pruned towers."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', with the configs of pruned towers as what they are."""
        fields = {name: value for name, value in config_dict.items() if name != "portable"}
        for name, part in _pruned_parts(config_dict):
            fields[name] = CONFIG_MAPPING[part["model_type"]].from_dict(part)
        return super().from_dict(fields, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """As transformers'; a sentence stands for the widths of pruned towers, over which stock classes stumble."""
        config: Any = self
        fields = json.loads(config.to_json_string(use_diff=use_diff))
        for name, part in _pruned_parts(fields):
            mark_pruned(part, getattr(config, name))
        Path(json_file_path).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _pruned_parts(fields: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names and fields of the pruned towers in a config's fields."""
    parts = [(name, part) for name, part in fields.items() if isinstance(part, dict)]
    return [(name, part) for name, part in parts if str(part.get("model_type", "")).startswith(PRUNED_PREFIX)]


class PrunedHostMixin(StrictMixin):
    """Mixed in front of a stock class that makes its towers itself."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        with contextlib.ExitStack() as stack:
            for part in vars(config).values():  # stock constructors want a width that the heads divide
                if isinstance(part, PreTrainedConfig) and str(part.model_type).startswith(PRUNED_PREFIX):
                    stack.enter_context(fields_set(part, family_of(part).skeleton_heads(part)))
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        for path, tower in stock_towers(model):
            put(model, path, pruned_model_class(type(tower))(tower.config))

    def check_loaded(self, info: dict[str, Any]) -> None:
        """All of the model, with all of its towers."""
        for what, keys in (
            ("lacks", info["missing_keys"]),
            ("also holds", info["unexpected_keys"]),
            ("has other sizes for", [str(row[0]) for row in info["mismatched_keys"]]),
        ):
            if keys:
                raise CheckpointMismatchError(f"the checkpoint {what} {len(keys)} tensors (first: {sorted(keys)[0]})")


def stock_towers(model: nn.Module) -> list[tuple[str, PreTrainedModel]]:
    """Paths of modules that have the config of a pruned tower and are none; not those inside of one."""
    found: list[tuple[str, PreTrainedModel]] = []
    seen: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not path or path.startswith(seen) or not isinstance(module, PreTrainedModel):
            continue
        model_type = str(module.config.model_type)
        if model_type.startswith(PRUNED_PREFIX) and not model_type.startswith(HOST_PREFIX):
            seen = (*seen, f"{path}.")
            found += [] if isinstance(module, PrunedModelMixin) else [(path, module)]
    return found


def host_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
    """The twin of a class that makes its towers itself; None where there is none."""
    if issubclass(model_class, PrunedHostMixin):
        return model_class
    model_type = getattr(getattr(model_class, "config_class", None), "model_type", None)  # a module of torch has none
    if model_type in _configs:
        make_models(_configs[model_type])
    return _hosts.get(model_class)


def stock_host(model_class: type[PreTrainedModel]) -> type[PreTrainedModel] | None:
    """Inverse of :func:`host_class`; None for another class."""
    return next((stock for stock, twin in _hosts.items() if twin is model_class), None)


def _register(model_type: str) -> None:
    config_class = CONFIG_MAPPING[model_type]
    body = {"model_type": HOST_PREFIX + model_type, "__module__": __name__}
    config: Any = type(f"PrunedTower{config_class.__name__}", (PrunedHostConfigMixin, config_class), body)
    globals()[config.__name__] = _configs[model_type] = config
    AutoConfig.register(config.model_type, config)
    when_used(config, lambda: _make_hosts(model_type, config))


def _make_hosts(model_type: str, config: Any) -> None:
    copy_conversions(config.model_type, model_type)
    for name, auto_names in HOSTS[model_type].items():
        stock: Any = getattr(transformers, name)
        body = {"config_class": config, "config": config, "__module__": __name__}
        made: Any = type(f"Pruned{name}", (PrunedHostMixin, stock), body)
        globals()[made.__name__] = _hosts[stock] = made
        copy_conversions(made.__name__, name)
        for auto_name in auto_names:
            getattr(transformers, auto_name)._model_mapping.register(config, made, exist_ok=True)


for _model_type in HOSTS:
    _register(_model_type)


def __getattr__(name: str) -> Any:
    # a model class: made when asked for
    for model_type, classes in HOSTS.items():
        if name.removeprefix("Pruned") in classes and name.startswith("Pruned"):
            make_models(_configs[model_type])
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
