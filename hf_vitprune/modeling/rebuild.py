"""A pruned model made from the stock class and a record of what differs: what portable folders load by.

``portable.py`` writes the record, and ``portable_source.py`` puts this file's parts, and those that the record names,
into one file beside the weights. So nothing here may need the families, or anything else of the engine.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import CheckpointMismatchError
from ..utils.mixing import mix_into
from ..utils.modules import get, put


def rebuild_(model: nn.Module, record: dict[str, Any], parts: dict[str, Any]) -> None:
    """Give a stock model the modules, sizes and attributes of a pruned one, in place; new tensors are empty.

    Args:
        model: what the stock class makes from the config.
        record: path of a module, parents first -> ``class`` and ``arguments`` of what takes its place; ``without``,
            names of modules in it that go; ``mixins`` in front of its class; ``tensors``, names -> shapes;
            ``buffers``, new ones: names -> (shape, dtype, persistent); ``attributes``; ``hook``, the name of a
            function that is called in front of it.
        parts: what the record names.
    """
    for path, changes in record.items():
        if "class" in changes:
            put(model, path, parts[changes["class"]](**changes["arguments"]))
        module = get(model, path)
        for name in changes.get("without", ()):
            module._modules[name] = None
        for name in changes.get("mixins", ()):
            mix_into(module, parts[name])
        for name, shape in changes.get("tensors", {}).items():
            tensors = module._parameters if name in module._parameters else module._buffers
            empty = tensors[name].new_empty(shape)
            tensors[name] = nn.Parameter(empty) if tensors is module._parameters else empty
        for name, (shape, dtype, persistent) in changes.get("buffers", {}).items():
            module.register_buffer(name, torch.empty(shape, dtype=getattr(torch, dtype)), persistent=persistent)
        for name, value in changes.get("attributes", {}).items():
            module._parameters.pop(name, None)  # a factor that has nothing left to scale
            module.__dict__[name] = value_from(value, parts)
        if "hook" in changes:
            module.register_forward_pre_hook(parts[changes["hook"]], with_kwargs=True)
        if hasattr(module, "make_table"):
            module.make_table()


def value_from(value: Any, parts: dict[str, Any]) -> Any:
    """An attribute from JSON: ``{"tuple": [...]}``, ``{"scalar": 1.0}`` and ``{"part": name}``."""
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    made: Any = {"tuple": tuple, "part": parts.get, "scalar": functools.partial(torch.tensor, device="cpu")}
    return made[kind](content)


def materialize(model: Any, device: torch.device) -> None:
    """Give a meta skeleton real, initialised weights on ``device``."""
    model.to_empty(device=device)
    for module in model.modules():
        if isinstance(getattr(module, "input_index", None), torch.Tensor):  # any choice: there are no weights yet
            module.input_index = torch.arange(len(module.input_index), device=device)
        if getattr(module, "qk_index", None) is not None:
            module.register_channels(module.rotated)
    with torch.no_grad():
        for parameter in model.parameters():  # some that stock constructors make of zeros, nobody initialises
            parameter.zero_()
    model.initialize_weights()


@contextlib.contextmanager
def fields_set(config: Any, values: dict[str, Any]) -> Iterator[None]:
    """Other values for some fields (``vision_config.num_attention_heads``) of a config, or of its JSON."""
    before = {path: set_field(config, path, value) for path, value in values.items()}
    try:
        yield
    finally:
        for path, value in before.items():
            set_field(config, path, value)


def set_field(config: Any, path: str, value: Any) -> Any:
    """Set a field of a config, or of its JSON (where missing parts are made), by its dotted path; what was there."""
    *parents, name = path.split(".")
    for parent in parents:
        config = config.setdefault(parent, {}) if isinstance(config, dict) else getattr(config, parent)
    fields = config if isinstance(config, dict) else config.__dict__
    before = fields.get(name)
    fields[name] = value
    return before


def config_from(read: Callable[..., Any], fields: dict[str, Any], record: dict[str, Any]) -> Any:
    """What ``read`` (``from_dict`` of a stock config) makes of the JSON of a portable config, with its real sizes."""
    fields = copy.deepcopy(fields)
    for path, (value, _) in record["fields"].items():
        set_field(fields, path, value)
    real = {path: set_field(fields, path, value) for path, value in record["building"].items()}
    made = read(fields)
    for path, value in real.items():
        set_field(made[0] if isinstance(made, tuple) else made, path, value)
    return made


class PortableConfigMixin:
    """Config with the record of a pruned model (``portable``), which stock classes do not load by mistake.

    ``portable`` holds ``fields``, path -> (value, what the file says); ``building``, path -> value while the stock
    class builds; ``modules``, see :func:`rebuild_`.
    """

    def validate_architecture(self) -> None:
        """Stock configs want a width divisible by the heads; a pruned width need not be."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', with what the file says in the place of some fields set right."""
        read = functools.partial(super().from_dict, **kwargs)  # type: ignore[misc]
        return config_from(read, config_dict, config_dict["portable"])

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """As transformers', with what stock classes stumble over."""
        config: Any = self
        fields = json.loads(config.to_json_string(use_diff=use_diff))
        for path, (_, said) in config.portable["fields"].items():
            set_field(fields, path, said)
        Path(json_file_path).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class PortableModelMixin:
    """Mixed in front of a stock model class: builds that, makes it the pruned one, and loads all of it or nothing."""

    #: what the record names
    parts: dict[str, Any]

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        ambient = torch.empty(0).device
        record: Any = config.portable
        with fields_set(config, record["building"]), torch.device("meta"):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        with torch.device("meta"):
            rebuild_(self, record["modules"], self.parts)  # type: ignore[arg-type]
        if ambient.type != "meta":  # from_pretrained fills in the weights itself
            materialize(self, ambient)

    def save_pretrained(self, *args: Any, save_original_format: bool = False, **kwargs: Any) -> None:
        """As transformers', but always under the model's own parameter names."""
        super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', but never with weights that are missing (CheckpointMismatchError)."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        replaced = {str(row[0]) for row in info["mismatched_keys"]}  # a head for other labels
        lost = sorted(key for key in info["missing_keys"] if key not in replaced and not key.endswith("mask_token"))
        if lost:
            raise CheckpointMismatchError(
                f"the checkpoint lacks {len(lost)} tensors of a {cls.__name__} (first: {lost[0]}): config.json and "
                "the weights are not of one model"
            )
        return (model, info) if output_loading_info else model
