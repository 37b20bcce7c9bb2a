"""PEFT types for adapters of pruned models: ``VITPRUNE_LORA`` beside ``LORA``, and so on for every tuner.

A stock adapter of a pruned model could be loaded on the full model, with a warning and other outputs. One of these
types carries the record of its base, and PEFT without this library does not know it and refuses.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME
from peft.utils.constants import DUMMY_TARGET_MODULES

from ..errors import AdapterError
from ..modeling.peft_twin import is_shared
from .folder import BASE_FOLDER, base_beside, watch, write_base
from .kinds import kind_named, kind_of
from .kinds.kind import PREFIX, Tensors, add_peft_method
from .record import fit_base, fit_heads, recorded_labels, set_labels
from .shared import target_visible_layers

#: tuners that are made of others
EXCLUDED = ("XLORA",)
#: fields of an adapter_config.json that say where things come from; what is pruned has its own fingerprint
NOT_DIGESTED = {
    "auto_mapping", "base_model_name_or_path", "digest", "inference_mode", "peft_type", "peft_version", "pruning",
    "revision",
}  # fmt: skip
#: fields of a config that are rewritten for a pruned base, or belong to how the old adapter was made
DROPPED = {
    "peft_type", "peft_version", "auto_mapping", "pruning", "exclude_modules", "layers_to_transform", "layers_pattern",
}  # fmt: skip


class PrunedAdapterConfigMixin:
    """Config with the record of the pruned base (``pruning``), and a digest of all that the adapter computes by."""

    pruned_peft_type: str
    digest: dict[str, Any] | None
    pruning: dict[str, Any]
    base_model_name_or_path: str | None

    def __getstate__(self) -> dict[str, Any]:
        """Without the model that it is the config of: a copy may become another's."""
        return {name: value for name, value in self.__dict__.items() if name != "_model"}

    def __post_init__(self) -> None:
        if self.digest is not None:
            check_digest(vars(self), self.digest)
            self.digest = None  # of the file: what is changed in memory is meant
            if self.pruning.get("base") == BASE_FOLDER:
                self.base_model_name_or_path = base_beside(self.base_model_name_or_path)
        super().__post_init__()  # type: ignore[misc]
        self.peft_type = PeftType(self.pruned_peft_type)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's, naming the Auto class, which loads the dense base and the pruned one alike.

        With the adapter goes the pruned base that it needs: see :mod:`hf_vitprune.peft.folder`.

        Raises:
            NotFiniteError: there are weights that are not finite.
        """
        base = write_base(self, Path(save_directory))
        mapping = kwargs.get("auto_mapping_dict")
        if mapping is not None:
            found = getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"], None)
            auto_classes = getattr(found, "auto_classes", ())
            if auto_classes:
                kwargs["auto_mapping_dict"] = {"base_model_class": auto_classes[0], "parent_library": "transformers"}
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        path = Path(save_directory) / CONFIG_NAME
        fields = json.loads(path.read_text(encoding="utf-8"))
        if base is not None:
            fields |= {"base_model_name_or_path": base, "revision": None}
            fields["pruning"]["base"] = BASE_FOLDER
        path.write_text(json.dumps({**fields, "digest": make_digest(fields)}, indent=2, sort_keys=True))


class PrunedTunerMixin:
    """Tuner that checks the base model, or cuts it down, before it puts adapters in."""

    def _pre_injection_hook(self, model: Any, config: Any, adapter_name: str) -> None:
        fit_base(model, config)
        watch(model)
        super()._pre_injection_hook(model, config, adapter_name)  # type: ignore[misc]

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]  # type: ignore[attr-defined]
        fit_base(model, config)  # a second adapter comes here only
        shared = is_shared(model)
        if shared:
            target_visible_layers(model, config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)  # type: ignore[misc]
        fit_heads(model, config, adapter_name)
        labels = recorded_labels(config)
        if labels and not shared and len(self.peft_config) == 1:  # type: ignore[attr-defined]
            set_labels(model, labels)

    def _check_merge_allowed(self) -> None:
        if is_shared(self.model):  # type: ignore[attr-defined]
            raise AdapterError(
                "merging into a shared backbone would change it for every task and keep all of its layers; load the "
                "adapter into a base of its own, and merge there"
            )
        super()._check_merge_allowed()  # type: ignore[misc]


def register_peft_types() -> None:
    """Make ``VITPRUNE_<TYPE>`` known to PEFT for every tuner that works in layers; calling it again does nothing."""
    for peft_type, tuner in list(PEFT_TYPE_TO_TUNER_MAPPING.items()):
        kind = str(peft_type.value)
        if kind.startswith(PREFIX) or kind in EXCLUDED or PREFIX + kind in PeftType._value2member_map_:
            continue
        if issubclass(tuner, BaseTuner):
            _register(kind, PEFT_TYPE_TO_CONFIG_MAPPING[peft_type], tuner, PEFT_TYPE_TO_PREFIX_MAPPING[peft_type])


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
    config = dataclasses.make_dataclass(
        f"Pruned{config_class.__name__}",
        [
            ("pruning", dict, dataclasses.field(default_factory=dict)),
            ("digest", dict, dataclasses.field(default=None)),
        ],
        bases=(PrunedAdapterConfigMixin, config_class),
        namespace={"pruned_peft_type": name, "__module__": __name__},
    )
    bases = [base for base in (PrunedTunerMixin, kind_named(kind).tuner_mixin, tuner) if base is not object]
    model = type(f"Pruned{tuner.__name__}", tuple(bases), {"__module__": __name__})
    globals()[config.__name__], globals()[model.__name__] = config, model  # importable by name
    add_peft_method(name, config, model, prefix)


def pruned_config(config: Any, layers: Mapping[str, tuple[str, Any]], saved: list[str], record: dict[str, Any]) -> Any:
    """The config of one adapter on the pruned base: the old one's settings, for modules named one by one.

    Args:
        layers: new name -> (old name, old layer) of the layers that keep this adapter.
        saved: new names of the modules it trains as a whole.
    """
    kind = kind_of(config)
    made = pruned_config_class(kind.name)
    known = {field.name for field in dataclasses.fields(made) if field.init}
    kept = known & {field.name for field in dataclasses.fields(config)} - {*DROPPED, *kind.settings_dropped}
    fields = {name: copy.deepcopy(getattr(config, name)) for name in kept}
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
    """A LoRA config, with scaling 1, for an adapter of another kind whose tensors in all ``layers`` became LoRA's."""
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


def make_digest(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter_config.json computes by, in one number, with the names of the fields that it covers."""
    names = sorted(fields.keys() - NOT_DIGESTED)
    return {"fields": names, "sha256": _number({name: fields[name] for name in names})}


def check_digest(fields: Mapping[str, Any], digest: Any) -> None:
    """Compare fields as they are read with the digest beside them.

    Raises:
        AdapterError: the file was changed or damaged.
    """
    if isinstance(digest, dict) and isinstance(digest.get("fields"), list):
        names = [name for name in digest["fields"] if isinstance(name, str) and name in fields]
        if digest == {"fields": names, "sha256": _number({name: fields[name] for name in names})}:
            return
    raise AdapterError(
        "adapter_config.json is not as it was saved, and would load another adapter than was trained: fetch it again, "
        "or change settings on the loaded config"
    )


def _number(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(fields), sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Without order where PEFT keeps none: sets of names are written as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [_plain(item) for item in value]
        return sorted(items) if all(isinstance(item, str) for item in items) else items
    return value
