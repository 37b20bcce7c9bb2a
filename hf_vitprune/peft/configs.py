"""Configs of sliced adapters: the old one's settings, for modules named one by one in the new numbering."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key

from ..errors import AdapterError
from .types import kind_of, pruned_config_class

#: fields that are rewritten, or belong to how the old adapter was made
DROPPED = (
    "peft_type",
    "peft_version",
    "auto_mapping",
    "pruning",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
)
#: what cannot be expressed by names of modules
REFUSED = ("target_parameters", "layer_replication", "trainable_token_indices", "modules_to_tie")
#: initialisations of LoRA that leave the base weights alone
HARMLESS_INITS = (True, False, "gaussian", "eva")


def check_config(config: Any) -> None:
    """Refuse settings that do not survive a change of the model's structure.

    Raises:
        AdapterError: naming the field.
    """
    for field in REFUSED:
        if getattr(config, field, None):
            raise AdapterError(f"an adapter with {field} cannot be carried over to a pruned model; merge it first")


def changes_base(config: Any) -> bool:
    """The adapter changed the base weights when it was made (PiSSA and the like)."""
    return getattr(config, "init_lora_weights", True) not in HARMLESS_INITS


def pruned_config(
    config: Any,
    names: dict[str, str],
    feedforward: list[str],
    saved: list[str],
    record: dict[str, Any],
) -> Any:
    """The config of one adapter on the pruned base.

    Args:
        config: the old one.
        names: old name -> new name of the layers that keep this adapter.
        feedforward: new names of IA3's feed-forward layers.
        saved: new names of the modules it trains as a whole.
        record: see ``pruning_record``.
    """
    kind = kind_of(config)
    made = pruned_config_class(kind)
    known = {field.name for field in dataclasses.fields(made) if field.init}
    old = {f.name for f in dataclasses.fields(config)}
    fields = {name: copy.deepcopy(getattr(config, name)) for name in known & old - set(DROPPED)}
    fields["target_modules"] = sorted(names.values()) or DUMMY_TARGET_MODULES
    fields["pruning"] = copy.deepcopy(record)
    if "modules_to_save" in known:
        fields["modules_to_save"] = saved or None
    if "feedforward_modules" in known:
        fields["feedforward_modules"] = feedforward
    if isinstance(fields.get("init_lora_weights"), str):
        fields["init_lora_weights"] = True  # the weights are there; making them anew would change the base again
    for name in fields:
        if name.endswith("_pattern") and isinstance(fields[name], dict):
            fields[name] = renamed_pattern(fields[name], names, kind)
    return made(**fields)


def lora_config_for_vera(config: Any) -> Any:
    """A stock LoRA config of the same rank and scaling 1."""
    from peft import LoraConfig

    shared = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "bias", "modules_to_save")
    fields = {name: copy.deepcopy(getattr(config, name)) for name in shared}
    return LoraConfig(
        r=config.r, lora_alpha=config.r, lora_dropout=config.vera_dropout, target_modules=["*"], **fields
    )


def renamed_pattern(pattern: dict[str, Any], names: dict[str, str], kind: str) -> dict[str, Any]:
    """Ranks or alphas that differ by layer, for layers named one by one.

    Args:
        pattern: of the old config; keys are regular expressions of names.
        names: old name -> new name.
        kind: of adapter; AdaLoRA's keys are whole names.
    """
    if kind == "ADALORA":
        return _renamed_ranks(pattern, names)
    renamed = {}
    for old, new in names.items():
        key = get_pattern_key(list(pattern), old)
        if key in pattern:
            renamed[new] = pattern[key]
    return renamed


def _renamed_ranks(pattern: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """AdaLoRA's finished allocation: which ranks stay of ``<layer>.lora_E``."""
    renamed = {}
    for key, kept in pattern.items():
        layer, tail, rest = key.partition(".lora_E")
        if layer in names:
            renamed[names[layer] + tail + rest] = kept
    return renamed
