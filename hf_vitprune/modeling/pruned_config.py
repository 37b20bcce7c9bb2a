"""Configs of pruned models: read and written with their record, their model classes made when the first one is.

Importing 28 stock modeling files takes half a second. Whoever loads a model has its config first, so that the Auto
classes know by then which models there are.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import InvalidArchitectureError
from ..families import all_families, base_model_type, family_of
from ..spec.configs import check_depth
from .folder import NOT_STOCK, STUB, STUB_MODULE

_waiting: dict[type, Callable[[], None]] = {}
_lock = threading.RLock()


class FirstUseMixin:
    """A config class whose first instance, read, copied or unpickled, has the model classes made."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        make_models(cls)
        return super().__new__(cls)


def when_used(config_class: type, make: Callable[[], None]) -> None:
    """Have ``make`` called once, before the first instance of a :class:`FirstUseMixin` is there."""
    _waiting[config_class] = make


def make_models(config_class: type) -> None:
    """Make the model classes of a config class, if they are not there yet."""
    with _lock:  # another thread waits until they are
        if config_class in _waiting:
            _waiting[config_class]()
            _waiting.pop(config_class)


def forget_models(config_class: type) -> None:
    """Undo :func:`when_used`."""
    _waiting.pop(config_class, None)


class PrunedConfigMixin(FirstUseMixin):
    """Config with a ``pruning_config``: the record of the pruned shape (None: dense)."""

    def validate_architecture(self) -> None:
        """Stock configs want a width divisible by the heads; a pruned width need not be."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', but never without the ``pruning_config``, or with impossible or changed values."""
        stated: Any = cls
        config_dict = {name: value for name, value in config_dict.items() if name != "portable"}
        if config_dict.get("model_type") != stated.model_type:  # of a stock checkpoint
            config_dict = {name: value for name, value in config_dict.items() if name != "model_type"}
        elif not config_dict.get("pruning_config"):
            raise InvalidArchitectureError(
                f"the config is of a {stated.model_type} model but has no pruning_config, without which its sizes are "
                "unknown; fetch config.json again"
            )
        fields = unsealed(_with_width(config_dict, stated.model_type), stated)
        for name, kinds in (("dtype", (str, torch.dtype, dict)), ("architectures", (list, tuple))):
            if not isinstance(fields.get(name), (*kinds, type(None))):
                raise InvalidArchitectureError(f"config.json says {name} {fields[name]!r}; fetch it again")
        for sizes in (fields, *(value for value in fields.values() if isinstance(value, dict))):
            for name in ("num_hidden_layers", "depths"):
                check_depth(sizes.get(name))
        try:
            return super().from_dict(fields, **kwargs)  # type: ignore[misc]
        except (AttributeError, LookupError, TypeError) as error:
            raise InvalidArchitectureError(
                f"config.json holds what no config of a {stated.model_type} can ({error}); fetch it again"
            ) from error

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """As transformers', with what keeps others from loading the folder as something else."""
        config: Any = self
        fields = json.loads(config.to_json_string(use_diff=use_diff))
        mark_pruned(fields, config)
        Path(json_file_path).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers', with the loader stub that ``auto_map`` names."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        names = sorted({path.rpartition(".")[2] for path in (getattr(self, "auto_map", None) or {}).values()})
        if names:
            stub = STUB.format(imports=", ".join(names), exports=", ".join(f'"{name}"' for name in names))
            (Path(save_directory) / f"{STUB_MODULE}.py").write_text(stub)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Saving writes a stub that imports this package; the source files are not copied."""


def mark_pruned(fields: dict[str, Any], config: Any) -> None:
    """Put into the fields of a pruned model's config.json, in place, a sentence for the residual width, and the seal.

    Stock classes would load some pruned folders without a word: no size tells that a layer is gone.
    """
    if fields.get("pruning_config"):
        fields[SEALED] = _read_by_forward(fields, type(config))
        family = family_of(config)
        sizes = fields.setdefault(family.sub_config, {}) if family.sub_config else fields
        sizes[family.width_field] = NOT_STOCK


def _with_width(fields: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The fields of a config.json with a number for the residual width."""
    family = next(f for f in all_families() if f.model_type == base_model_type(model_type))
    sizes = fields.get(family.sub_config) if family.sub_config else fields
    if not isinstance(sizes, dict) or not str(sizes.get(family.width_field)).startswith(NOT_STOCK[:23]):
        return fields  # of format version 1, or damaged
    record = fields.get("pruning_config")
    width = record.get("hidden_size") if isinstance(record, dict) else None
    if type(width) is not int:
        raise InvalidArchitectureError(f"pruning_config has no whole number for hidden_size, but {width!r}")
    sizes = {**sizes, family.width_field: width}
    return {**fields, family.sub_config: sizes} if family.sub_config else sizes


# ---------------------------------------------------------------------- fields that no tensor tells
#: key of config.json, and of no config in memory
SEALED = "sealed_fields"
#: sizes that the record of the pruned shape has, and checks
_RECORDED = {"hidden_size", "embed_dim", "num_hidden_layers", "depths", "num_attention_heads", "num_heads"}
#: fields that only training reads
_TRAINING = re.compile("drop|init")


def unsealed(fields: dict[str, Any], config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a config.json, without the note, if they are as it says; folders of old have none."""
    if SEALED not in fields:
        return fields
    stated, found = fields[SEALED], _read_by_forward(fields, config_class)
    if not isinstance(stated, dict):
        raise InvalidArchitectureError(f"config.json says {stated!r} for {SEALED}; fetch it again")
    for name in sorted({*stated, *found}):
        now, then = (values.get(name, "nothing") for values in (found, stated))
        if now != then:
            raise InvalidArchitectureError(
                f"config.json says {now!r} for {name}, and said {then!r} when the model was saved, which would be "
                f"another model: fetch it again. To change it on purpose, load with from_pretrained(folder, "
                f"{name.rpartition('.')[2]}=...) and save that"
            )
    return {name: value for name, value in fields.items() if name != SEALED}


def _read_by_forward(fields: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """Path -> value of what is of the model's kind, and not of training alone, in a config and those inside of it."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(config_class)} - general - _RECORDED - {"pruning_config"}
    found = {name: fields[name] for name in sorted(own & fields.keys()) if not _TRAINING.search(name)}
    for name, sub_class in config_class.sub_configs.items():
        if isinstance(fields.get(name), dict) and dataclasses.is_dataclass(sub_class):
            inside = _read_by_forward(fields[name], sub_class)
            found = {**found, **{f"{name}.{key}": value for key, value in inside.items()}}
            found.pop(name, None)
    return found
