"""What every Pruned<X> class adds to its stock class: built by its record, saved with a stub, loaded strictly."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..errors import CheckpointMismatchError, InvalidArchitectureError
from ..spec.architecture import Architecture, write_record
from .custom import check_class, check_modules, loading
from .folder import STUB_MODULE
from .rebuild import fields_set, materialize
from .strict import StrictMixin
from .structure import layer_paths, resize_


class PrunedModelMixin(StrictMixin):
    """Mixed in front of a stock model class; see ``hf_vitprune.modeling.registry`` for how the classes are made."""

    #: class name without the family prefix, set on every generated class
    pruning_task: str
    #: names of the Auto classes that map the stock class, set on every generated class
    auto_classes: tuple[str, ...]
    #: the class in front of which this one was put, set on every generated class
    dense_class: type

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        check_class(type(self), config)
        architecture = Architecture.from_config(config, self.pruning_task)
        if config.pruning_config is None:  # a stock checkpoint is being loaded
            config.pruning_config = write_record(architecture)
        family = architecture.family
        ambient = torch.empty(0).device
        dense_heads = fields_set(family.sizes_config(config), family.skeleton_heads(config))
        try:
            with torch.device("meta"), dense_heads:
                super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        except (ArithmeticError, LookupError, RuntimeError) as error:
            raise InvalidArchitectureError(
                f"no {self.dense_class.__name__} can be built from this config: {error}"
            ) from error
        model: Any = self
        dense_width = Architecture.dense(architecture.config).hidden_size
        with torch.device("meta"):
            family.finish_structure(model, config, dense_width)
        resize_(model, architecture)
        # from_pretrained builds on the meta device and fills in the weights itself
        if ambient.type != "meta":
            materialize(model, ambient)
        self._built_as = architecture

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As :class:`StrictMixin`'s, with a loader stub; NotADirectoryError where transformers would only log it."""
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file; save_pretrained needs a folder")
        model: Any = self
        classes = {"AutoConfig": type(model.config)} | {auto: type(model) for auto in self.auto_classes}
        model.config.auto_map = {auto: f"{STUB_MODULE}.{made.__name__}" for auto, made in classes.items()}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Called by ``load_state_dict``: PEFT and Trainer pass over tensors that have no place, and load the rest."""
        _check_same_depth(self, (key[len(prefix) :] for key in state_dict if key.startswith(prefix)))
        check_adapters_whole(self, prefix, state_dict.keys())
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', but never the lower part of an adapter of a deeper model (CheckpointMismatchError)."""
        before = set(getattr(self, "peft_config", {}))
        info = super().load_adapter(*args, **kwargs)  # type: ignore[misc]
        try:
            _check_same_depth(self, info.unexpected_keys)
        except CheckpointMismatchError:
            model: Any = self
            model.delete_adapter([name for name in model.peft_config if name not in before])
            raise
        return info

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As :class:`StrictMixin`'s; built for the weights of a folder."""
        with loading():
            return super().from_pretrained(*args, **kwargs)

    def check_loaded(self, info: dict[str, Any]) -> None:
        """All layers that the config states, and of this very class its head, too."""
        model: Any = self
        _check_layers_complete(model, info)
        check_modules(model, info)
        _check_own_head(model, info)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Saving writes a stub that imports this package; the source files are not copied."""


def _check_same_depth(model: Any, keys: Iterable[str]) -> None:
    """Refuse tensors of layers beyond those of the model."""
    architecture = Architecture.of(model)
    prefix = architecture.family.encoder_path(model)
    names = {f"{prefix}{name}" for name in architecture.layer_names()}
    lists = {f"{prefix}{path}" for path in architecture.layer_lists()}
    for key in keys:
        for path in lists:
            number = key.removeprefix(f"{path}.").partition(".")[0]
            if key.startswith(f"{path}.") and number.isdigit() and f"{path}.{number}" not in names:
                raise CheckpointMismatchError(
                    f"there is {key}, and this {architecture.model_type} has {len(names)} layers: this is "
                    "of a deeper model. Load it into that one, and truncate both together"
                )


def _may_be_missing(key: str) -> bool:
    """Mask tokens come with pretraining only; PEFT never saves AdaLoRA's ``ranknum``, which follows from the rank."""
    return key.endswith("mask_token") or ".ranknum." in key


def _check_own_head(model: Any, info: dict[str, Any]) -> None:
    """A checkpoint of this very class has its head, too, and nothing more."""
    name = type(model).__name__
    if name not in (model.config.architectures or ()):
        return
    lost = sorted(key for key in info["missing_keys"] if not _may_be_missing(key))
    if lost:
        raise CheckpointMismatchError(
            f"the checkpoint is of a {name} and lacks {len(lost)} of its tensors (first: {lost[0]})"
        )
    left = sorted(info["unexpected_keys"])
    if left:
        raise CheckpointMismatchError(
            f"the checkpoint is of a {name}, and config.json leaves no place for {len(left)} of its tensors (first: "
            f"{left[0]}; num_labels is {model.config.num_labels})"
        )


def _check_layers_complete(model: Any, info: dict[str, Any]) -> None:
    """Missing heads are normal (a base checkpoint); missing or left-over encoder weights mean a wrong model."""
    architecture: Architecture = model._built_as
    family = architecture.family
    root = family.encoder_path(model)
    layers = [paths.layer + "." for paths in layer_paths(model, architecture)]
    parts = (*layers, f"{root}embeddings.", *(f"{root}{norm}." for norm in family.norms))
    folder = f"{family.layers}."
    missing = [key for key in info["missing_keys"] if key.startswith(parts) and not _may_be_missing(key)]
    unexpected = [key for key in info["unexpected_keys"] if key.startswith(folder) or f".{folder}" in key]
    mismatched = [str(row[0]) for row in info["mismatched_keys"] if str(row[0]).startswith(tuple(layers))]
    for what, keys in (("lacks", missing), ("also holds", unexpected), ("has other sizes for", mismatched)):
        if keys:
            raise CheckpointMismatchError(
                f"the checkpoint {what} {len(keys)} tensors of the encoder (first: {sorted(keys)[0]}), so it is not "
                f"the {len(layers)}-layer model that its config states"
            )


#: PEFT does not save these in every layer: they follow from others or from a seed, or all layers share them
_NOT_SAVED = (".ranknum.", ".vera_A", ".vera_B", ".vblora_vector_bank")


def check_adapters_whole(model: Any, prefix: str, given: Collection[str]) -> None:
    """Refuse a part of an adapter, of which PEFT would load what is there: the rest would keep its random weights.

    ``given``: names of the tensors that are being loaded, those of the model with ``prefix``.
    """
    first: dict[int, str] = {}  # a tensor that is shared is saved under one of its names
    alike = {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}
    for adapter in getattr(model, "peft_config", {}):
        there = {name for name in given if name.startswith(prefix) and _belongs(name, adapter)}
        if not there:
            continue  # a checkpoint of something else
        known = {prefix + name: prefix + same for name, same in alike.items() if _belongs(name, adapter)}
        loaded = {known.get(name, name) for name in there}
        missing = {same for name, same in known.items() if same not in loaded}
        for what, wrong in (("lacks", missing), ("also holds", there - known.keys())):
            wrong = {name for name in wrong if not any(one in name for one in _NOT_SAVED)}
            if wrong:
                raise CheckpointMismatchError(
                    f"the checkpoint {what} {len(wrong)} tensors of the adapter {adapter!r} (first: "
                    f"{sorted(wrong)[0]}): it is damaged, or of another adapter; fetch it again"
                )


def _belongs(name: str, adapter: str) -> bool:
    return f".{adapter}." in name or name.endswith(f".{adapter}")
