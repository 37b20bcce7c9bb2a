"""What an adapter's config says of the pruned base and the labels it belongs to; a model that is made to fit them."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..errors import AdapterError
from ..modeling.peft_twin import is_shared
from ..modeling.structure import resize_
from ..plan.lineage import lineage_of
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture, dense_of, write_record
from ..spec.configs import is_pruned
from ..surgery.transplant import empty_like

#: version of the ``pruning`` record in adapter_config.json
RECORD_VERSION = 1
Labels = dict[int, str]


def pruning_record(model: Any, altered: bool, part: str = "") -> dict[str, Any]:
    """The record for adapters on a model that is pruned, or whose tower at ``part`` is.

    ``altered``: its weights are not those of the dense checkpoint. ``kept_layers`` is set where a dense checkpoint can
    stand in for the pruned base: only layers were removed.
    """
    base: Any = model.get_submodule(part)
    architecture = Architecture.of(base)
    info = lineage_of(base.config)
    return {
        "version": RECORD_VERSION,
        "model_type": architecture.model_type,
        "plan": info["plan"],
        "part": part,
        "kept_layers": None if altered or part else info.get("kept_layers"),
        "source": seal(dense_of(base.config, architecture.task)),
        "architecture": write_record(architecture),
        "labels": labels_of(base),
    }


def seal(architecture: Architecture) -> str:
    return write_record(architecture)["fingerprint"]


def fit_base(model: Any, config: Any) -> None:
    """Check that ``model`` is the pruned base an adapter was made for; cut one with more layers down to it.

    A base that has all its layers is cut in place, as a copy would not be the caller's model.

    Raises:
        AdapterError: the base is another one; says which is needed.
    """
    record = _checked(config.pruning)
    try:
        model = model.get_submodule(record.get("part", ""))
    except AttributeError as error:
        raise AdapterError(
            f"this adapter belongs to a model with a pruned {record['model_type']} at {record['part']}, and the base "
            f"model, a {type(model).__name__}, has nothing there"
        ) from error
    check_heads(model, config)
    found = Architecture.of(model)
    info = lineage_of(model.config)
    kept = record["kept_layers"]
    if info.get("plan") == record["plan"] and found.model_type == record["model_type"]:
        sizes = write_record(found)
        # the rest of the record is the dense sizes; where layers were all that went, those make no difference
        keys = ["fingerprint"] if kept is None else ["per_layer_config", "hidden_size"]
        if all(sizes[key] == record["architecture"][key] for key in keys):
            return
    dense = not is_pruned(model.config)
    there = list(range(len(found.layers))) if dense else info.get("kept_layers")
    if (
        kept is not None
        and there is not None
        and set(kept) <= set(there)
        and found.model_type == record["model_type"]
        and seal(dense_of(model.config, found.task)) == record["source"]
    ):
        if is_shared(model):
            if kept != list(range(len(kept))):
                raise AdapterError(
                    f"a shared backbone runs its first layers, and this adapter's model keeps layers {kept}; load it "
                    "into a base of its own"
                )
            return
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise AdapterError(
                f"this adapter belongs to a model of {len(kept)} layers, and the base model of {len(there)} already "
                "has adapters; load it into a fresh base model, or all of them into one base prepared by "
                "hf_vitprune.peft.share_backbone"
            )
        truncate_in_place(model, [there.index(layer) for layer in kept])
        return
    path = getattr(config, "base_model_name_or_path", None)
    cure = (
        f"load the dense {record['model_type']} that it was pruned from, or the base saved with it"
        if kept is not None
        else "load the pruned base model that was saved with it (hf_vitprune.peft.save_pruned_peft keeps the two "
        "together)"
    )
    raise AdapterError(
        f"this adapter belongs to a pruned {_describe(record)}, and the base model is a "
        f"{'dense' if dense else 'pruned'} {found.model_type} of {len(found.layers)} layers and width "
        f"{found.hidden_size} that is not it; {cure}" + (f" (its config names {path!r})" if path else "")
    )


def _describe(record: dict[str, Any]) -> str:
    shape = record["architecture"]
    kept = record["kept_layers"]
    layers = f"{len(shape['per_layer_config'])} layers and width {shape['hidden_size']}"
    return f"{record['model_type']} of {layers}" + (f" (layers {kept} of the dense one)" if kept is not None else "")


def _checked(record: Any) -> dict[str, Any]:
    needed = {"version", "model_type", "plan", "kept_layers", "source", "architecture"}
    if not isinstance(record, dict) or record.get("version") != RECORD_VERSION or needed - record.keys():
        version = record.get("version") if isinstance(record, dict) else None
        raise AdapterError(
            f"the adapter's config holds no pruning record of version {RECORD_VERSION} (found {version!r}); it was "
            "written by another version of hf_vitprune, or by hand"
        )
    shape, kept = record["architecture"], record["kept_layers"]
    if not isinstance(shape, dict) or not {"fingerprint", "per_layer_config", "hidden_size"} <= shape.keys():
        raise AdapterError("the adapter's pruning record is damaged: its architecture is incomplete")
    if kept is not None and (not isinstance(kept, list) or any(type(i) is not int for i in kept)):
        raise AdapterError(f"the adapter's pruning record is damaged: kept_layers is {kept!r}")
    return record


def truncate_in_place(model: Any, kept: list[int]) -> None:
    """Turn a model into its pruned class with only these layers; modules and tensors stay the same objects.

    Raises:
        AdapterError: the model is a backbone, whose outputs are named after layers.
        InvalidPlanError: layers that the model has not got.
    """
    if type(model).__name__.endswith("Backbone"):
        raise AdapterError("a backbone names its layers; prune it first, then load the adapter")
    plan = PruningPlan.dense(model).keep_layers(kept)
    small = empty_like(model, plan)
    family, old, new = plan.source.family, model.config, small.config
    resize_(model, plan.architecture, [entry.index for entry in plan.layers])
    configs = {id(old): new, id(family.sizes_config(old)): family.sizes_config(new)}
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in configs:
            module.config = configs[id(config)]
    model.__class__ = type(small)


# ---------------------------------------------------------------------- labels
def labels_of(model: Any) -> dict[str, str] | None:
    """For the record: number -> name of every label; None for a model that has no classifier."""
    config = model.config
    return {str(i): str(name) for i, name in config.id2label.items()} if _heads(model) and config.num_labels else None


def recorded_labels(config: Any) -> Labels | None:
    """Of the task that an adapter was trained for; None where its record names none."""
    labels = getattr(config, "pruning", {}).get("labels")
    return {int(i): name for i, name in labels.items()} if labels else None


def set_labels(model: Any, labels: Labels) -> None:
    """In config and model; the Linears stay as they are."""
    model.config.id2label = dict(labels)
    model.config.label2id = {name: i for i, name in labels.items()}
    if hasattr(model, "num_labels"):
        model.num_labels = len(labels)


def check_heads(model: Any, config: Any) -> None:
    """Refuse an adapter for other labels than the base has, unless it has a classifier of its own.

    Raises:
        AdapterError: with both numbers of labels.
    """
    labels = recorded_labels(config)
    if labels is None or len(labels) == model.config.num_labels:
        return
    saved = getattr(config, "modules_to_save", None) or ()
    if not _heads(model) or not all(name in saved for name in _heads(model)):
        raise AdapterError(
            f"the adapter was trained for {len(labels)} labels and the base model has {model.config.num_labels}; the "
            f"adapter holds no classifier (modules_to_save), so load the base model with num_labels={len(labels)} and "
            "the classifier that the adapter was trained with"
        )
    if not is_shared(model) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise AdapterError(
            f"this adapter is for {len(labels)} labels, and those of the model, which has adapters already, are "
            f"{model.config.num_labels}; prepare the dense model with "
            "hf_vitprune.peft.share_backbone before loading them"
        )


def fit_heads(model: Any, config: Any, adapter: str) -> None:
    """Give the adapter's own copy of the classifier as many outputs as the adapter has labels."""
    labels = recorded_labels(config)
    if labels is None:
        return
    for name in _heads(model):
        wrapper = getattr(model, name)
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter not in wrapper.modules_to_save:
            continue
        old = wrapper.modules_to_save[adapter]
        if isinstance(old, nn.Linear) and old.out_features != len(labels):
            new = nn.Linear(
                old.in_features, len(labels), old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
            )
            new.requires_grad_(old.weight.requires_grad).train(old.training)
            wrapper.modules_to_save[adapter] = new


def _heads(model: Any) -> list[str]:
    """Names of the classifiers of a task model."""
    if not Architecture.of(model).task.startswith("ForImageClassification"):
        return []
    root = Architecture.of(model).family.root
    return [name for name, part in model.named_children() if name != root and _is_linear(part)]


def _is_linear(part: nn.Module) -> bool:
    original = getattr(part, "original_module", getattr(part, "base_layer", part))
    return isinstance(original, nn.Linear) and isinstance(original.weight, torch.Tensor)
