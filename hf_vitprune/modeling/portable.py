"""Folders that load without this library: a pruned model's differences from its stock class, and one file of source.

The differences are found by comparing two skeletons on the meta device: what the stock class makes, and what loading
with this library makes. Making the second from the first by them is tried before anything is written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import InvalidConfigError, PortableError
from ..families import PRUNED_PREFIX, base_model_type, family_of
from ..spec.configs import lineage_of
from ..utils.mixing import InPlaceMixin, stock_type
from ..utils.modules import get, named_tensors
from .conv_mixer import give_grid
from .custom import CUSTOM
from .folder import PORTABLE, STUB_MODULE
from .portable_source import MOST_LINES, assemble
from .rebuild import fields_set, rebuild_

#: model type of a portable bigger model, whose stock class asks the Auto classes for its tower
WHOLE_TYPE = f"{PRUNED_PREFIX}tower_model"
_HEADER = """{name}, a pruned model: loads with transformers alone, and trust_remote_code=True.

Put together from the source of hf_vitprune (Apache License 2.0), which made the model. What of the stock class was
changed, and how, is in config.json (portable).
"""
_FOOTER = """class {config}(PortableConfigMixin, {stock_config}):
    model_type = "{model_type}"

class {model}(PortableModelMixin, {stock_model}):
    config_class = {config}
    config: {config}{prefix}
    parts = globals()
"""
_RUNTIME = {"PortableConfigMixin": f"{__package__}.rebuild", "PortableModelMixin": f"{__package__}.rebuild"}


class Portable:
    """What a portable folder of a model holds beside the weights.

    Attributes:
        source: text of the file.
        config: of the model, for ``config.json``: its fields.
    """

    def __init__(self, model: Any) -> None:
        """Find the differences.

        Args:
            model: of a class of this package, or a stock one with pruned towers inside.

        Raises:
            PortableError: naming what the file would leave out.
        """
        stock_class: Any = _stock_class(model)
        _check_parts(model, stock_class)
        model_config = model.config
        fields = json.loads(model_config.to_json_string(use_diff=False))
        stock_type_ = _stock_model_type(model_config)
        swaps, building = dict(_swaps(model_config)), dict(_building(model_config))
        plain = _stock_config(fields, stock_type_, swaps, building)
        plain._attn_implementation = model_config._attn_implementation
        with torch.device("meta"), no_init_weights():
            ours = stock_type(model)(copy.deepcopy(model_config))
            with fields_set(plain, building):
                stock = stock_class(plain)
        _check_same(model, ours)
        self.parts: dict[str, Any] = {}
        modules = dict(_differences(stock, ours, self.parts))
        with torch.device("meta"):
            rebuild_(stock, modules, self.parts)
        left = dict(_differences(stock, ours, {}))
        assert not left, f"rebuilding leaves differences: {left}"
        own_type = model_config.model_type
        self.model_type = own_type if own_type.startswith(PRUNED_PREFIX) else WHOLE_TYPE
        self.record: dict[str, Any] = {
            "fields": swaps,
            "building": building,
            "modules": modules,
            "stock_type": stock_type_,
        }
        self.stock_class, self.stock_config = stock_class, type(plain)
        self.base_prefix = type(model).base_model_prefix
        autos = tuple(_auto_classes(stock_class, type(plain)))
        # AutoBackbone takes no folders of this machine, and some classes have no Auto class
        self.auto_classes = (*autos, "AutoModel") if autos in ((), ("AutoBackbone",)) else autos
        names = f"Pruned{self.stock_config.__name__}", f"Pruned{stock_class.__name__}"
        self.config_name, self.model_name = names
        self.source = self._source()

    def _source(self) -> str:
        prefix = self.base_prefix != self.stock_class.base_model_prefix
        footer = _FOOTER.format(
            config=self.config_name,
            stock_config=self.stock_config.__name__,
            model_type=self.model_type,
            model=self.model_name,
            stock_model=self.stock_class.__name__,
            prefix=f'\n    base_model_prefix = "{self.base_prefix}"' if prefix else "",
        )
        stock: dict[str, set[str]] = {}
        for made in (self.stock_config, self.stock_class):
            stock.setdefault(made.__module__, set()).add(made.__name__)
        needed = dict(_RUNTIME)
        for name, part in self.parts.items():
            if part.__module__.partition(".")[0] == __name__.partition(".")[0]:
                needed[name] = part.__module__
            else:
                stock.setdefault("torch.nn", set()).add(name)
        text = assemble(needed, _HEADER.format(name=self.model_name), footer, stock)
        assert text.count("\n") <= MOST_LINES, f"{self.model_name}: {text.count(chr(10))} lines"
        return text

    def write_config(self, folder: Path) -> None:
        """Make the ``config.json`` in a folder that of the portable model, and write the file beside it."""
        path = folder / "config.json"
        fields = json.loads(path.read_text(encoding="utf-8"))
        for place, (_, said) in self.record["fields"].items():
            with_field(fields, place, said)
        module = {"AutoConfig": self.config_name} | dict.fromkeys(self.auto_classes, self.model_name)
        fields["auto_map"] = {auto: f"{STUB_MODULE}.{name}" for auto, name in module.items()}
        fields |= {"model_type": self.model_type, "portable": self.record}
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / f"{STUB_MODULE}.py").write_text(self.source, encoding="utf-8")


def save_portable(model: Any, save: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
    """Save a model as a portable folder.

    Args:
        model: to save.
        save: its ``save_pretrained`` of another folder; called with the rest.
        folder: to save in.

    Raises:
        PortableError: the model holds what the file cannot bring along; nothing is written then.
        InvalidConfigError: ``push_to_hub``, with which the file would come too late.
    """
    if kwargs.get("push_to_hub"):
        raise InvalidConfigError(
            "save_pretrained(push_to_hub=True) of a portable folder: use push_to_hub(portable=True)"
        )
    portable = Portable(model)
    save(folder, *args, **kwargs)
    if model.should_save_on_this_rank(kwargs.get("is_main_process", args[0] if args else True)):
        portable.write_config(Path(folder))


# ---------------------------------------------------------------------- configs
def with_field(fields: dict[str, Any], path: str, value: Any) -> None:
    """Set a field of a config's JSON, by its dotted path; parts that are not there are made."""
    *parents, name = path.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
    fields[name] = value


def pruned_configs(config: PreTrainedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Configs of pruned towers, the model's own included, by path (with a dot behind)."""
    if getattr(config, "pruning_config", None) is not None:
        yield prefix, config
        return
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from pruned_configs(value, f"{prefix}{name}.")


def _sizes_path(prefix: str, config: PreTrainedConfig) -> str:
    sub = family_of(config).sub_config
    return f"{prefix}{sub}." if sub else prefix


def _swaps(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Path of a field -> its value, and what the file says in its place."""
    for prefix, part in pruned_configs(config):
        family = family_of(part)
        if not config.model_type.startswith(PRUNED_PREFIX):  # an unknown model_type inside is enough
            yield f"{prefix}model_type", (base_model_type(part.model_type), part.model_type)
            continue
        width = getattr(family.sizes_config(part), family.width_field)
        yield f"{_sizes_path(prefix, part)}{family.width_field}", (width, PORTABLE)
        if prefix:
            yield f"{prefix}model_type", (base_model_type(part.model_type), part.model_type)


def _building(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Path of a field -> a value with which stock constructors accept any width."""
    for prefix, part in pruned_configs(config):
        for name, value in family_of(part).skeleton_heads(part).items():
            yield f"{_sizes_path(prefix, part)}{name}", value


def _stock_model_type(config: PreTrainedConfig) -> str:
    stock = next(made for made in type(config).__mro__ if made.__module__.startswith("transformers.models."))
    return str(stock.model_type)  # type: ignore[attr-defined]


def _stock_config(
    fields: dict[str, Any], model_type: str, swaps: dict[str, tuple[Any, Any]], building: dict[str, Any]
) -> Any:
    fields = {**copy.deepcopy(fields), "model_type": model_type}
    for path, (value, _) in swaps.items():
        with_field(fields, path, value)
    with fields_set(fields, building):
        made = CONFIG_MAPPING[model_type].from_dict(fields)
    for path in building:
        *parents, name = path.split(".")
        source, target = fields, made
        for parent in parents:
            source, target = source[parent], getattr(target, parent)
        target.__dict__[name] = source.get(name)
    return made


def _auto_classes(stock_class: type, config_class: type) -> Iterator[str]:
    """Names of the Auto classes that map a stock class."""
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None:
            classes = mapping.get(config_class, ())
            if stock_class in (classes if isinstance(classes, tuple) else (classes,)):
                yield name


# ---------------------------------------------------------------------- what cannot be written
def _check_parts(model: Any, stock_class: type) -> None:
    """Refuse what only the user's code makes.

    Raises:
        PortableError: naming the class or the module.
    """
    known = ("transformers.", f"{__name__.partition('.')[0]}.")
    written = [made for made in type(model).__mro__ if not made.__module__.startswith(known)]
    written = [made for made in written if issubclass(made, stock_class)]
    if written:
        raise PortableError(
            f"{written[-1].__name__} is made by code that is not transformers' ({written[-1].__module__}), which is "
            "not ours to write into a portable folder: leave portable=True out, and give others that code and "
            "hf_vitprune"
        )
    for prefix, config in pruned_configs(model.config):
        custom = lineage_of(config).get(CUSTOM)
        if custom:
            what = custom.get("class") or ", ".join(list(custom.get("modules", ()))[:3])
            raise PortableError(
                f"{prefix}{what} is not what transformers makes from the config, and its code is not ours to write "
                "into a portable folder: leave portable=True out, and give others that code and hf_vitprune"
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise PortableError(
            "the model has adapters of transformers' own (add_adapter), of which save_pretrained writes nothing else: "
            "merge them, for instance get_peft_model(...).merge_and_unload(), and save that"
        )


def _check_same(model: nn.Module, ours: nn.Module) -> None:
    """Refuse a model that was changed after it was made: loading makes another.

    Raises:
        PortableError: naming the first tensor or module.
    """
    live, made = ({name: tuple(t.shape) for name, t in named_tensors(m)} for m in (model, ours))
    names = sorted(name for name in live.keys() | made.keys() if live.get(name) != made.get(name))
    if not names:
        names = [
            path for path, module in ours.named_modules() if _stock_class(get(model, path)) is not _stock_class(module)
        ]
    if names:
        raise PortableError(
            f"{names[0]} is not what the model's config makes: it was changed after pruning, or holds adapters. Merge "
            "adapters (merge_and_unload); leave portable=True out for modules of your own"
        )


# ---------------------------------------------------------------------- differences
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


def _differences(stock: nn.Module, ours: nn.Module, parts: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What :func:`rebuild_` makes the first into the second by, parents first.

    Args:
        parts: filled with the classes and functions that are named.
    """
    theirs = dict(stock.named_modules(remove_duplicate=False))
    replaced: tuple[str, ...] = ()
    for path, module in ours.named_modules(remove_duplicate=False):
        if path.startswith(replaced):
            continue
        other = theirs.get(path)
        changes: dict[str, Any] = {}
        if other is None or _stock_class(other) is not _stock_class(module):
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
    found: dict[str, Any] = {
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


def _stock_class(module: nn.Module) -> type:
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
