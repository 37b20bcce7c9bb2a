"""What an adapter's config says of the pruned base it belongs to; a base that is made to fit, or refused."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import AdapterError
from ..modeling.peft_twin import is_shared
from ..plan.lineage import lineage_of
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture, dense_of, write_record
from ..spec.configs import is_pruned
from ..surgery.transplant import empty_like
from .heads import check_heads, labels_of
from .shared import check_first_layers

#: version of the ``pruning`` record in adapter_config.json
RECORD_VERSION = 1


def pruning_record(model: Any, altered: bool, part: str = "") -> dict[str, Any]:
    """The record for adapters on a pruned base.

    Args:
        model: pruned, or with a pruned tower, whose config carries a record of its own.
        altered: its weights are not those of the dense checkpoint (adapters were merged into them, or had changed
            them when they were made).
        part: path of the tower in the model.

    ``kept_layers`` is set where a dense checkpoint can stand in for the pruned base: only layers were removed.
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
            check_first_layers(kept)
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
    prefix = family.encoder_path(model)
    lists: dict[str, list[nn.Module]] = {}
    for name in plan.source.layer_names():
        lists.setdefault(prefix + name.rpartition(".")[0], [])
    for entry in plan.layers:
        path = prefix + plan.source.layer_names()[entry.index]
        lists[path.rpartition(".")[0]].append(model.get_submodule(path))
    for path, layers in lists.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.ModuleList(layers))
    configs = {id(old): new, id(family.sizes_config(old)): family.sizes_config(new)}
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in configs:
            module.config = configs[id(config)]
    model.__class__ = type(small)
