"""What a config says of a model: its task, how it was pruned, and the stock config of its dense form."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import InvalidArchitectureError, UnsupportedModelError
from ..families import PRUNED_PREFIX, Family, base_model_type, family_of


def task_of(model: Any) -> str:
    """Class name without the family's prefix: ``ViTForImageClassification`` -> ``ForImageClassification``."""
    stated = getattr(model, "pruning_task", None)
    if stated:
        return stated
    stock = next((c for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")), type(model))
    return strip_family(stock.__name__, type(model.config).__name__)


def strip_family(model_class: str, config_class: str) -> str:
    """Task part of a class name: the config's name tells the prefix (of CLIPVisionConfig, ``CLIP`` too).

    VitPoseBackbone is all that VitPoseBackboneConfig has, and its task is ``Backbone``.
    """
    family = config_class.removesuffix("Config")
    prefixes = (family, family.removesuffix("Vision"), family.removesuffix("Backbone"))
    tasks = (model_class.removeprefix(p) for p in prefixes if model_class.startswith(p))
    return next((task for task in tasks if task), model_class)


def lineage_of(config: PreTrainedConfig) -> dict[str, Any]:
    """How a model was pruned: info in the record of a pruned config, or plain data in a stock one; may be empty."""
    record = getattr(config, "pruning_config", None)
    info = record.get("info") if isinstance(record, dict) else getattr(config, "pruning_info", None)
    return info if isinstance(info, dict) else {}


def is_pruned(config: PreTrainedConfig) -> bool:
    """Whether a config is of a Pruned class, or of a stock model that pruning made."""
    return getattr(config, "pruning_config", None) is not None or bool(lineage_of(config))


def fingerprint(record: dict[str, Any]) -> str:
    """Digest of everything else in a record: shapes alone cannot tell 4 heads of 32 from 8 heads of 16.

    The same in every version, as adapters name their base by it.
    """
    rest = {k: v for k, v in record.items() if k not in ("fingerprint", "info", "head_dims")} | {"version": 1}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The stock config of the dense model behind a stock or pruned config (a copy for pruned ones)."""
    if not isinstance(config, PreTrainedConfig):
        inner = isinstance(getattr(config, "config", None), PreTrainedConfig)
        cure = ": pass its .config" if inner else ""
        raise UnsupportedModelError(f"a config is asked for, not a {type(config).__name__}{cure}")
    if not config.model_type.startswith(PRUNED_PREFIX):
        return config
    family = family_of(config)
    # a copy under the stock class, attribute by attribute: parsing a config anew takes longer than building a model
    base = copy.copy(config)
    base.__class__ = CONFIG_MAPPING[base_model_type(config.model_type)]
    base.__dict__.pop("model_type", None)  # configs read from a file hold it, and it hides that of the class
    record = base.__dict__.pop("pruning_config", None)
    for name in ("architectures", "auto_map"):
        setattr(base, name, None)
    if family.sub_config:
        setattr(base, family.sub_config, copy.copy(getattr(config, family.sub_config)))
    if isinstance(record, dict):
        dense = _checked_dense_sizes(record.get("dense"), family, config)
        sizes = family.sizes_config(base)
        if "num_attention_heads" in dense:
            sizes.num_attention_heads = dense["num_attention_heads"]
        hidden = dense.get("hidden_size", sizes.hidden_size)
        layers = dense.get("num_hidden_layers", sizes.num_hidden_layers)
        family.resize_config(base, hidden, layers, tuple(dense["depths"]) if "depths" in dense else None)
        if "num_attention_heads" in dense:  # some families adapt the heads to the width
            sizes.num_attention_heads = dense["num_attention_heads"]
    return base


def dense_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy with the sizes that the dense model had: a pruned config's record has them, a stock one plain data."""
    base = copy.deepcopy(stock_config(config))
    sizes = lineage_of(config).get("dense")
    target = family_of(base).sizes_config(base)
    for name, size in sizes.items() if isinstance(sizes, dict) else ():
        if size is None:  # a field that the dense config did not have
            vars(target).pop(name, None)
        else:
            setattr(target, name, size)
    return base


def dense_sizes(depths: tuple[int, ...] | None) -> tuple[str, ...]:
    """Fields of the dense config that a record keeps; ``depths``: of a model with stages."""
    return ("hidden_size", "num_hidden_layers", "num_attention_heads") if depths is None else ("depths",)


def checked_depths(depths: Any) -> tuple[int, ...] | None:
    if depths is None:
        return None
    if not isinstance(depths, (list, tuple)) or not depths or any(type(d) is not int for d in depths):
        raise InvalidArchitectureError(f"depths {depths!r} is no list of whole numbers")
    return tuple(depths)


def possible_depths(depths: tuple[int, ...], layers: int) -> bool:
    """Whether stages of these depths have so many layers, and none above an empty one."""
    filled = [depth for depth in depths if depth > 0]
    return sum(depths) == layers and list(depths[: len(filled)]) == filled and min(depths) >= 0


def _checked_dense_sizes(dense: Any, family: Family, config: PreTrainedConfig) -> dict[str, Any]:
    names = dense_sizes(family.depths(config))
    if not isinstance(dense, dict) or {*dense} != {*names}:
        raise InvalidArchitectureError(f"pruning_config: dense sizes {dense!r} are not {', '.join(sorted(names))}")
    for name, size in dense.items():
        sizes = size if name == "depths" and isinstance(size, list) else [size]
        least = [1] + [0] * (len(sizes) - 1)  # the last stages may be empty
        if not sizes or any(
            type(s) is not int or not low <= s <= 1 << 16 for low, s in zip(least, sizes, strict=True)
        ):
            raise InvalidArchitectureError(f"pruning_config: dense {name} is {size!r}")
    own_head_dim = getattr(family.sizes_config(config), "head_dim", None)
    if not own_head_dim and dense.get("hidden_size", 0) % dense.get("num_attention_heads", 1):
        raise InvalidArchitectureError(f"pruning_config: dense width and heads of {dense} do not divide")
    return dense


def make_config(model_type: Any, fields: dict[str, Any]) -> PreTrainedConfig:
    """A stock config from JSON; InvalidArchitectureError where transformers refuses the fields."""
    if not isinstance(model_type, str):
        raise InvalidArchitectureError(f"the config's model_type is {model_type!r}")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # whatever a damaged field breaks
        raise InvalidArchitectureError(f"no {model_type} model has this config: {error}") from error


#: more than any model has
MOST_LAYERS = 10_000


def check_depth(layers: Any) -> None:
    """Refuse a number of layers (or one a stage) that would fill the memory before anything else is noticed."""
    numbers = layers if isinstance(layers, (list, tuple)) else [layers]
    if any(isinstance(number, (int, float)) and number > MOST_LAYERS for number in numbers):
        raise InvalidArchitectureError(f"the config says {layers} layers, which no model has; fetch config.json again")
