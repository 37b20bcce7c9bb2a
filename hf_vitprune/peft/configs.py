"""Configs of sliced adapters: the old one's settings, for modules named one by one in the new numbering."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES

from .kinds import kind_of
from .kinds.kind import Tensors
from .types import pruned_config_class

#: fields that are rewritten, or belong to how the old adapter was made
DROPPED = (
    "peft_type",
    "peft_version",
    "auto_mapping",
    "pruning",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)


def pruned_config(config: Any, layers: Mapping[str, tuple[str, Any]], saved: list[str], record: dict[str, Any]) -> Any:
    """The config of one adapter on the pruned base.

    Args:
        config: the old one.
        layers: new name -> (old name, old layer) of the layers that keep this adapter.
        saved: new names of the modules it trains as a whole.
        record: see ``pruning_record``.
    """
    kind = kind_of(config)
    made = pruned_config_class(kind.name)
    known = {field.name for field in dataclasses.fields(made) if field.init}
    old = {f.name for f in dataclasses.fields(config)}
    dropped = {*DROPPED, *kind.settings_dropped}
    fields = {name: copy.deepcopy(getattr(config, name)) for name in (known & old) - dropped}
    fields["target_modules"] = sorted(layers) or DUMMY_TARGET_MODULES
    fields["pruning"] = copy.deepcopy(record)
    if "modules_to_save" in known:
        fields["modules_to_save"] = saved or None
    kind.rewrite(fields, {new: layer for new, (_, layer) in layers.items()})
    names = {old: new for new, (old, _) in layers.items()}
    for name in fields:
        if name.endswith("_pattern") and isinstance(fields[name], dict):
            fields[name] = kind.renamed_pattern(name, fields[name], names)
    return made(**fields)


def lora_config(config: Any, layers: Mapping[str, Tensors], adapter: str) -> Any:
    """A LoRA config for an adapter of another kind that became LoRA, with scaling 1.

    Args:
        config: of the adapter.
        layers: old name -> its LoRA tensors in that layer.
        adapter: its name.
    """
    fields = {
        name: copy.deepcopy(getattr(config, name))
        for name in ("base_model_name_or_path", "revision", "task_type", "inference_mode", "bias", "modules_to_save")
        if hasattr(config, name)
    }
    part = f"lora_A.{adapter}.weight"
    ranks = {name: tensors[part][0].shape[0] for name, tensors in layers.items() if part in tensors}
    most = max(ranks.values(), default=1)
    smaller = {name: rank for name, rank in ranks.items() if rank != most}
    return LoraConfig(
        r=most,
        lora_alpha=most,
        lora_dropout=getattr(config, f"{kind_of(config).name.lower()}_dropout", 0.0),
        target_modules=["*"],
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        **fields,
    )
