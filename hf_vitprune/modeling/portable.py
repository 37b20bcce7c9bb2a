"""Folders that load without this library: a pruned model's differences from its stock class, and one file of source.

The differences are found by comparing two skeletons on the meta device: what the stock class makes, and what loading
with this library makes. Making the second from the first by them is tried before anything is written.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import InvalidConfigError, PortableError
from ..families import PRUNED_PREFIX, base_model_type, family_of
from ..spec.configs import lineage_of
from ..utils.mixing import stock_type
from ..utils.modules import get
from .custom import CUSTOM
from .folder import PORTABLE, STUB_MODULE
from .outer import shapes_of
from .portable_record import differences, stock_class_of
from .portable_source import MOST_LINES, assemble
from .pruned_config import SEALED
from .rebuild import config_from, fields_set, rebuild_, set_field

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
    """What a portable folder of a model holds beside the weights: ``source`` of the file, ``record`` for config.json.

    Args:
        model: of a class of this package, or a stock one with pruned towers inside.
    """

    def __init__(self, model: Any) -> None:
        stock_class: Any = stock_class_of(model)
        _check_parts(model, stock_class)
        model_config = model.config
        fields = json.loads(model_config.to_json_string(use_diff=False))
        configs: Any = type(model_config).__mro__
        stock_type_ = next(made.model_type for made in configs if made.__module__.startswith("transformers.models."))
        building = {  # fields with which stock constructors accept any width
            f"{_sizes_path(prefix, part)}{name}": value
            for prefix, part in pruned_configs(model_config)
            for name, value in family_of(part).skeleton_heads(part).items()
        }
        swaps = dict(_swaps(model_config))
        record = {"fields": swaps, "building": building}
        plain = config_from(CONFIG_MAPPING[stock_type_].from_dict, {**fields, "model_type": stock_type_}, record)
        plain._attn_implementation = model_config._attn_implementation
        with torch.device("meta"):
            ours = stock_type(model)(copy.deepcopy(model_config))
            with fields_set(plain, building):
                stock = stock_class(plain)
        _check_same(model, ours)
        self.parts: dict[str, Any] = {}
        modules = dict(differences(stock, ours, self.parts))
        with torch.device("meta"):
            rebuild_(stock, modules, self.parts)
        left = dict(differences(stock, ours, {}))
        assert not left and shapes_of(stock) == shapes_of(ours), f"rebuilding leaves differences: {left}"
        own_type = model_config.model_type
        self.model_type = own_type if own_type.startswith(PRUNED_PREFIX) else WHOLE_TYPE
        self.record: dict[str, Any] = {**record, "modules": modules, "stock_type": stock_type_}
        self.stock_class, self.stock_config = stock_class, type(plain)
        autos = tuple(_auto_classes(stock_class, type(plain)))
        # AutoBackbone takes no folders of this machine, and some classes have no Auto class
        self.auto_classes = (*autos, "AutoModel") if autos in ((), ("AutoBackbone",)) else autos
        self.config_name, self.model_name = f"Pruned{type(plain).__name__}", f"Pruned{stock_class.__name__}"
        own_prefix = type(model).base_model_prefix
        prefix = f'\n    base_model_prefix = "{own_prefix}"' if own_prefix != stock_class.base_model_prefix else ""
        self.source = self._source(prefix)

    def _source(self, prefix: str) -> str:
        footer = _FOOTER.format(
            config=self.config_name,
            stock_config=self.stock_config.__name__,
            model_type=self.model_type,
            model=self.model_name,
            stock_model=self.stock_class.__name__,
            prefix=prefix,
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
            set_field(fields, place, said)
        module = {"AutoConfig": self.config_name} | dict.fromkeys(self.auto_classes, self.model_name)
        fields["auto_map"] = {auto: f"{STUB_MODULE}.{name}" for auto, name in module.items()}
        fields |= {"model_type": self.model_type, "portable": self.record}
        fields.pop(SEALED, None)  # their own code does not read it, and would keep it when values change
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (folder / f"{STUB_MODULE}.py").write_text(self.source, encoding="utf-8")


def save_portable(model: Any, save: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
    """Save a model as a portable folder; ``save``: its ``save_pretrained`` of another folder, called with the rest."""
    if kwargs.get("push_to_hub"):
        raise InvalidConfigError(
            "save_pretrained(push_to_hub=True) of a portable folder: use push_to_hub(portable=True)"
        )
    portable = Portable(model)
    save(folder, *args, **kwargs)
    if model.should_save_on_this_rank(kwargs.get("is_main_process", args[0] if args else True)):
        portable.write_config(Path(folder))


# ---------------------------------------------------------------------- configs
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
    """Refuse what only the user's code makes."""
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
    """Refuse a model that was changed after it was made: loading makes another."""
    live, made = shapes_of(model), shapes_of(ours)
    names = sorted(name for name in live.keys() | made.keys() if live.get(name) != made.get(name))
    others = (p for p, m in ours.named_modules() if stock_class_of(get(model, p)) is not stock_class_of(m))
    names = names or list(others)
    if names:
        raise PortableError(
            f"{names[0]} is not what the model's config makes: it was changed after pruning, or holds adapters. Merge "
            "adapters (merge_and_unload); leave portable=True out for modules of your own"
        )
