"""What differs between what a stock class makes and a pruned model, as JSON: the record that ``rebuild.py`` reads."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PortableError
from ..utils.mixing import InPlaceMixin, stock_type
from .conv_mixer import give_grid

#: what stands in the place of a stock module -> the arguments that make it
_ARGUMENTS: dict[str, Any] = {
    "ConvMixer": lambda module: {
        **dict(zip(("kernel", "channels", "batch_norm"), module.shape, strict=True)),
        "width": module.conv.in_channels,
        "special_tokens": module.special_tokens,
        "output_name": module.output_name,
    },
    **dict.fromkeys(("IdentityMixer", "RemovedAttention", "RemovedMlp", "Identity"), lambda module: {}),
}
#: attributes that say nothing of what a module computes, or that the config says
_IGNORED = ("training", "config", "generation_config", "name_or_path")


def differences(stock: nn.Module, ours: nn.Module, parts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What :func:`rebuild_` makes the first into the second by, parents first; ``parts`` get what is named."""
    theirs = dict(stock.named_modules(remove_duplicate=False))
    replaced: tuple[str, ...] = ()
    for path, module in ours.named_modules(remove_duplicate=False):
        if path.startswith(replaced):
            continue
        other = theirs.get(path)
        changes: dict[str, Any] = {}
        if other is None or stock_class_of(other) is not stock_class_of(module):
            name = type(module).__name__
            if name not in _ARGUMENTS:
                raise PortableError(f"{path} is a {name}, which a portable folder cannot say")
            changes = {"class": _named(type(module), parts), "arguments": _ARGUMENTS[name](module)}
            replaced = (*replaced, f"{path}.")
        else:
            changes = _changes(path, other, module, parts)
        if changes:
            yield path, changes


def _changes(path: str, stock: Any, ours: Any, parts: dict[str, Any]) -> dict[str, Any]:
    gone = [name for name, child in stock._modules.items() if child is not None and ours._modules.get(name) is None]
    found: dict[str, Any] = {
        "without": gone,
        "mixins": [_named(mixin, parts) for mixin in _mixins(ours) if not isinstance(stock, mixin)],
        "tensors": {},
        "buffers": {},
        "attributes": {},
    }
    for name, tensor in [*ours._parameters.items(), *ours._buffers.items()]:
        if tensor is None:
            continue
        other = stock._parameters.get(name, stock._buffers.get(name))
        if other is None:
            persistent = name not in ours._non_persistent_buffers_set
            found["buffers"][name] = [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), persistent]
        elif other.shape != tensor.shape:
            found["tensors"][name] = list(tensor.shape)
    for name, value in vars(ours).items():
        if name in _IGNORED or (name.startswith("_") and name != "_qkv_same_embed_dim"):
            continue
        if name not in vars(stock) or not _equal(vars(stock)[name], value):
            said = _said(f"{path}.{name}", value, parts)
            if said is not _NOTHING:
                found["attributes"][name] = said
    hooks = [hook for hook in ours._forward_pre_hooks.values() if hook not in stock._forward_pre_hooks.values()]
    if hooks:
        assert hooks == [give_grid], hooks
        found["hook"] = _named(give_grid, parts)
    return {name: value for name, value in found.items() if value}


def _mixins(module: nn.Module) -> list[type]:
    """What was mixed in front of a module's class, innermost first."""
    found: list[type] = []
    made: Any = type(module)
    while issubclass(made, InPlaceMixin):
        found.insert(0, made.mixin_class)
        made = made.stock_class
    return found


def stock_class_of(module: nn.Module) -> type:
    """The class of transformers that a model is or inherits from; of other modules their own."""
    own = stock_type(module)
    models = (made for made in own.__mro__ if made.__module__.startswith("transformers.models."))
    return next(models, own) if isinstance(module, PreTrainedModel) else own


_NOTHING = object()


def _said(where: str, value: Any, parts: dict[str, Any]) -> Any:
    """An attribute for JSON; see ``rebuild.value_from``."""
    if isinstance(value, torch.Tensor):
        return {"scalar": float(value)} if not value.ndim else _NOTHING  # tables follow from attributes
    if isinstance(value, tuple):
        return {"tuple": list(value)}
    if isinstance(value, FunctionType):
        return {"part": _named(value, parts)}
    if _plain(value):
        return value
    if isinstance(value, (PreTrainedConfig, nn.Module)):
        return _NOTHING
    raise PortableError(f"{where} is a {type(value).__name__}, which a portable folder cannot say")


def _equal(one: Any, other: Any) -> bool:
    """Whether two attributes are alike, as far as JSON could say it."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape
    return not (_plain(one) and _plain(other)) or bool(one == other)


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_plain(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str, FunctionType))


def _named(part: Any, parts: dict[str, Any]) -> str:
    parts[part.__name__] = part
    return str(part.__name__)
