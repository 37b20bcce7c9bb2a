"""A pruned model as a stock transformers model, where a stock class can hold its shape: loads without this library."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import NativeExportError
from ..spec.architecture import Architecture
from ..spec.configs import lineage_of, stock_config
from ..spec.layer_shape import LayerShape
from ..utils.mixing import unmix
from ..utils.modes import on_meta
from .blocks import PrunedAttentionMixin, set_attention_sizes
from .pretrained import PrunedModelMixin
from .registry import carried_fields, stock_ancestor, stock_model_class
from .structure import layer_paths
from .whole_config import become_stock_, set_tower_config_


def to_native(model: Any) -> PreTrainedModel:
    """The stock transformers model that computes what a pruned model computes.

    Layers may be removed freely. Sizes must be the same in all layers, with one head dimension for q/k and v, and
    within what the family's stock config can say; Swin takes whole layers only, and only where the remaining windows
    alternate between plain and shifted as stock code has it. The query weights are rescaled, because stock attention
    divides by the square root of the *new* head dimension.

    Args:
        model: a pruned model, or a bigger one with pruned towers in it; a stock one is returned as it is.

    Returns:
        A new model of the dense model's class, with its own copy of the weights, on the same device, in the same
        dtype and training mode. How it was pruned is plain data in its config (``pruning_info``).

    Raises:
        NativeExportError: a stock class cannot hold this shape; the message names the tower, the layer and the size.
    """
    if not isinstance(model, PreTrainedModel):
        advice = "; merge the adapters first (merge_and_unload)" if hasattr(model, "peft_config") else ""
        raise NativeExportError(f"expected a pruned transformers model, got {type(model).__name__}{advice}")
    paths = [path for path, module in model.named_modules() if isinstance(module, PrunedModelMixin)]
    if not paths:
        return model
    made = copy.deepcopy(model)
    for path in paths:
        tower: Any = made.get_submodule(path)
        old = tower.config
        try:
            make_stock_(tower)
        except NativeExportError as error:
            raise NativeExportError(f"{path}: {error}" if path else str(error)) from error
        if path:
            set_tower_config_(made, old, tower.config)
    become_stock_(made)
    return made


def make_stock_(model: Any) -> None:
    """:func:`to_native` in place; nothing is changed where it raises."""
    architecture, old = Architecture.of(model), model.config
    config = native_config(architecture, old)
    stock = stock_model_class(type(model))
    with on_meta():
        expected = stock_ancestor(stock)(config)
    _check_same_tensors(model, expected, architecture)
    family, new = architecture.family, Architecture.dense(config, architecture.task)
    for i, paths in enumerate(layer_paths(model, architecture)):
        # stock attention divides by the root of the new head dimension
        scale = (architecture.layers[i].qk_dim / architecture.head_dim(i)) ** 0.5
        with torch.no_grad():
            for parameter in model.get_submodule(paths.q).parameters() if scale != 1 else ():
                parameter.copy_((parameter.double() * scale).to(parameter.dtype))
        attention = model.get_submodule(paths.attention)
        unmix(attention, PrunedAttentionMixin)  # some families had to have ours for another head_dim
        set_attention_sizes(attention, new.layers[i], new.scaling(i))
    replaced = {id(old): config, id(family.sizes_config(old)): family.sizes_config(config)}
    for module in model.modules():
        own = module.__dict__.get("config")
        if id(own) in replaced:
            module.config = replaced[id(own)]
    model.__dict__.pop("_built_as", None)
    model.__class__ = stock


def native_config(architecture: Architecture, config: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """The stock config of an architecture; NativeExportError where it cannot say this shape.

    ``config``: stock or pruned, gives labels and whatever else users keep there; by default the dense one.
    """
    base = architecture.config if config is None else config
    family = architecture.family
    if architecture.task in family.not_stock:
        raise NativeExportError(
            f"transformers does not load a {architecture.model_type} {architecture.task} as it saved it; keep the "
            "pruned model as it is"
        )
    dense_width = architecture.unpruned.hidden_size
    if architecture.hidden_size != dense_width and family.has_neck(base, architecture.task):
        raise NativeExportError(
            f"what reads the features of this {architecture.task} keeps {dense_width} channels, and in a stock "
            f"{architecture.model_type} it has the width of the layers; keep the pruned model as it is"
        )
    stock_class = type(stock_config(base))
    fields = carried_fields(base)
    if architecture.depths is not None:
        _check_stages(architecture)
        sizes: dict[str, Any] = {"depths": list(architecture.depths)}
    else:
        shape = _uniform_shape(architecture)
        try:
            sizes = family.uniform_config(
                architecture.config, shape.heads, shape.qk_dim, shape.mlp, architecture.hidden_size
            )
        except ValueError as error:
            raise NativeExportError(f"{error}; save the pruned model as it is instead") from error
        sizes = {"hidden_size": architecture.hidden_size, "num_hidden_layers": len(architecture.layers), **sizes}
        stages = {"stem", *(f"stage{i + 1}" for i in range(len(architecture.layers)))}
        if "out_features" in fields and not set(fields["out_features"]) <= stages:
            del fields["out_features"]  # of the dense depth
    target = fields[family.sub_config] if family.sub_config else fields
    dense = {name: getattr(family.sizes_config(architecture.config), name, None) for name in sizes}
    target.update(sizes)
    made = stock_class(**fields)
    made._attn_implementation = base._attn_implementation
    info = lineage_of(base)
    if info:
        made.pruning_info = {"dense": dense, **info}
    return made


def _uniform_shape(architecture: Architecture) -> LayerShape:
    """The one shape of all layers."""
    first = architecture.layers[0]
    for i, shape in enumerate(architecture.layers):
        for part, gone in (("attention", shape.mixer == "none"), ("MLP", shape.mlp == 0)):
            if gone:
                raise NativeExportError(f"layer {i} has no {part}; a stock layer always has both")
        if shape.mixer != "attention":
            raise NativeExportError(f"layer {i} mixes tokens by {shape.mixer!r}; a stock layer has attention")
        for name, what in (("attention_in", "attention"), ("mlp_in", "MLP")):
            size = getattr(shape, name)
            if size is not None:
                raise NativeExportError(
                    f"the {what} of layer {i} reads {size} of {architecture.width(i)} channels ({name}); in a stock "
                    "layer it reads all"
                )
        if shape.qk_dim != shape.v_dim:
            raise NativeExportError(
                f"layer {i} has qk_dim {shape.qk_dim} and v_dim {shape.v_dim}; a stock layer has one head_dim"
            )
        for name in ("heads", "qk_dim", "mlp"):
            if getattr(shape, name) != getattr(first, name):
                raise NativeExportError(
                    f"layer {i} has {name} {getattr(shape, name)}, layer 0 has {getattr(first, name)}; the layers of "
                    "a stock model are all of one size"
                )
    return first


def _check_stages(architecture: Architecture) -> None:
    """Refuse windowed models with anything removed but whole layers."""
    dense = architecture.unpruned
    starts = {stage: dense.stages.index(stage) for stage in dense.stages}
    place: dict[int, int] = {}
    for i, (shape, stage) in enumerate(zip(architecture.layers, architecture.stages, strict=True)):
        position = place[stage] = place.get(stage, -1) + 1
        full = dense.layers[starts[stage]]
        for name in ("mixer", "heads", "qk_dim", "v_dim", "mlp", "attention_in", "mlp_in"):
            if getattr(shape, name) != getattr(full, name):
                raise NativeExportError(
                    f"layer {i} has {name} {getattr(shape, name)}, stock {architecture.model_type} layers of stage "
                    f"{stage} have {getattr(full, name)}; only whole layers can be removed"
                )
        if shape.shifted != bool(position % 2):
            raise NativeExportError(
                f"layer {i} has {'shifted' if shape.shifted else 'plain'} windows, and a stock "
                f"{architecture.model_type} has {'shifted' if position % 2 else 'plain'} ones at place {position} of "
                f"stage {stage}; remove layers in pairs"
            )


def _check_same_tensors(model: nn.Module, stock: nn.Module, architecture: Architecture) -> None:
    """Refuse when the encoder has other tensors than a stock one: heads of the user's are the user's own matter."""
    encoder = architecture.family.encoder_path(model)
    pooler = f"{encoder}pooler."  # a base model may be made without
    ours, theirs = (
        {name: tuple(t.shape) for name, t in m.state_dict().items() if name.startswith(encoder)}
        for m in (model, stock)
    )
    different = sorted(name for name in ours.keys() ^ theirs.keys() if not name.startswith(pooler))
    if different:
        where = "pruned" if different[0] in ours else "stock"
        raise NativeExportError(
            f"{len(different)} tensors are in only one of the pruned and the stock encoder (first: {different[0]}, "
            f"in the {where} one); undo what was added to the model, and merge adapters (merge_and_unload)"
        )
    for name, shape in ours.items():
        if shape != theirs.get(name, shape):
            raise NativeExportError(
                f"{name} is {shape}, and {theirs[name]} in a stock {type(stock).__name__} of this config"
            )
