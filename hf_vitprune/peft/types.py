"""PEFT types for adapters of pruned models: ``VITPRUNE_LORA`` beside ``LORA``, and so on for every tuner.

A stock adapter of a pruned model could be loaded on the full model, with a warning and other outputs. One of these
types carries the record of its base, and PEFT without this library does not know it and refuses.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from ..errors import AdapterError
from ..modeling.peft_twin import is_shared
from .heads import fit_heads, recorded_labels, set_labels
from .methods.registry import add_member
from .record import fit_base
from .shared import target_visible_layers

PREFIX = "VITPRUNE_"
#: tuners that are made of others
EXCLUDED = ("XLORA",)


class PrunedAdapterConfigMixin:
    """Config with the record of the pruned base (``pruning``)."""

    pruned_peft_type: str

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        self.peft_type = PeftType(self.pruned_peft_type)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, naming the Auto class, which loads the dense base and the pruned one alike."""
        mapping = kwargs.get("auto_mapping_dict")
        if mapping is not None:
            found = getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"], None)
            auto_classes = getattr(found, "auto_classes", ())
            if auto_classes:
                kwargs["auto_mapping_dict"] = {"base_model_class": auto_classes[0], "parent_library": "transformers"}
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]


class PrunedTunerMixin:
    """Tuner that checks the base model, or cuts it down, before it puts adapters in."""

    pruned_kind: str

    def _pre_injection_hook(self, model: Any, config: Any, adapter_name: str) -> None:
        fit_base(model, config)
        super()._pre_injection_hook(model, config, adapter_name)  # type: ignore[misc]

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]  # type: ignore[attr-defined]
        fit_base(model, config)  # a second adapter comes here only
        shared = is_shared(model)
        if shared:
            target_visible_layers(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]
        fit_heads(model, config, adapter_name)
        if self.pruned_kind == "ADALORA" and config.rank_pattern:
            self.__dict__.setdefault("_resized", set()).discard(adapter_name)  # of a deleted adapter of this name
            self.resize_modules_by_rank_pattern(config.rank_pattern, adapter_name)
        labels = recorded_labels(config)
        if labels and not shared and len(self.peft_config) == 1:  # type: ignore[attr-defined]
            set_labels(model, labels)

    def resize_modules_by_rank_pattern(self, rank_pattern: dict[str, Any], adapter_name: str) -> None:
        """AdaLoRA's, done once: PEFT does it while it loads tensors, and transformers' ``load_adapter`` not at all."""
        done = self.__dict__.setdefault("_resized", set())
        if adapter_name not in done:
            super().resize_modules_by_rank_pattern(rank_pattern, adapter_name)  # type: ignore[misc]
            done.add(adapter_name)

    def _check_merge_allowed(self) -> None:
        if is_shared(self.model):  # type: ignore[attr-defined]
            raise AdapterError(
                "merging into a shared backbone would change it for every task and keep all of its layers; load the "
                "adapter into a base of its own, and merge there"
            )
        super()._check_merge_allowed()  # type: ignore[misc]

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As PEFT's, but DoRA's vectors keep full names: transformers' ``load_adapter`` misses the short ones."""
        state = super()._get_adapter_state_dict(*args, **kwargs)  # type: ignore[misc]
        return {
            f"{k}.weight" if ".lora_magnitude_vector." in k and k.count(".weight") == 0 else k: v
            for k, v in state.items()
        }


def register_peft_types() -> None:
    """Make ``VITPRUNE_<TYPE>`` known to PEFT for every tuner that works in layers; calling it again does nothing."""
    for peft_type, tuner in list(PEFT_TYPE_TO_TUNER_MAPPING.items()):
        kind = str(peft_type.value)
        if kind.startswith(PREFIX) or kind in EXCLUDED or PREFIX + kind in PeftType._value2member_map_:
            continue
        if issubclass(tuner, BaseTuner):
            _register(kind, PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], tuner, PEFT_TYPE_TO_PREFIX_MAPPING[peft_type])


def kind_of(config: Any) -> str:
    """``"LORA"`` for LORA and VITPRUNE_LORA."""
    return str(config.peft_type.value).removeprefix(PREFIX)


def pruned_config_class(kind: str) -> Any:
    """Config class of ``VITPRUNE_<kind>``.

    Raises:
        AdapterError: there is no such type.
    """
    register_peft_types()
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(PREFIX + kind)]
    except ValueError as error:
        raise AdapterError(
            f"adapters of type {kind} cannot be carried over to a pruned model; merge them first (merge_and_unload)"
        ) from error


def _register(kind: str, config_class: Any, tuner: Any, prefix: str) -> None:
    name = PREFIX + kind
    add_member(name)
    config = dataclasses.make_dataclass(
        f"Pruned{config_class.__name__}",
        [("pruning", dict, dataclasses.field(default_factory=dict))],
        bases=(PrunedAdapterConfigMixin, config_class),
        namespace={"pruned_peft_type": name, "__module__": __name__},
    )
    model = type(f"Pruned{tuner.__name__}", (PrunedTunerMixin, tuner), {"__module__": __name__, "pruned_kind": kind})
    globals()[config.__name__], globals()[model.__name__] = config, model  # importable by name
    register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=prefix)
