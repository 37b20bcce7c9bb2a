"""A model and a plan -> the small model, or the full-size copy that computes the same. Knows no method.

Both go through the same *cuts*: for every tensor of the small model, where it comes from in the big one and which
indices stay along which axis. ``prune`` gathers along them, ``mask`` scatters back into zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .architecture import Architecture, unwrap
from .errors import AdapterError, InvalidPlanError
from .families import LayerPaths
from .gates import strip_gates
from .lineage import lineage
from .modeling import config_for, pruned_model_class
from .modeling.blocks import mask_layer_norm
from .modeling.structure import layer_paths
from .plan import PAD, LayerPlan, PruningPlan


@dataclass
class Cut:
    """Where one tensor of the small model comes from: ``source`` indexed by ``index[axis]``, times ``scale[axis]``.

    An index of :data:`~hf_vitprune.plan.PAD` stands for zeros.
    """

    source: str
    index: dict[int, torch.Tensor] = field(default_factory=dict)
    scale: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The small tensor (always a copy)."""
        out = tensor
        for axis, index in self.index.items():
            index = index.to(tensor.device)
            out = out.index_select(axis, index.clamp(min=0))
            if (index == PAD).any():
                out = out * _along(axis, (index != PAD).to(out.dtype), out.ndim)
        for axis, scale in self.scale.items():
            out = out * _along(axis, scale.to(out.device, out.dtype), out.ndim)
        return out.clone() if out.data_ptr() == tensor.data_ptr() else out

    def scatter(self, small: torch.Tensor, full_shape: torch.Size) -> torch.Tensor:
        """Inverse of :meth:`take`: the small tensor at its old places in zeros of the full shape."""
        out = small
        for axis, index in reversed(self.index.items()):
            index = index.to(small.device)
            real = (index != PAD).nonzero().squeeze(1)
            shape = list(out.shape)
            shape[axis] = full_shape[axis]
            out = out.new_zeros(shape).index_copy(axis, index[real], out.index_select(axis, real))
        return out


def _along(axis: int, vector: torch.Tensor, ndim: int) -> torch.Tensor:
    return vector.view([-1 if i == axis else 1 for i in range(ndim)])


def prune(model: Any, plan: PruningPlan, *, allow_unchanged: bool = False) -> Any:
    """A new, physically small model: same task head, same outputs as ``mask(model, plan)``.

    Args:
        model: stock or pruned transformers model, or a PeftModel over one (its adapters are sliced with it).
        plan: what stays; made for this model or one of the same architecture.
        allow_unchanged: accept a plan that removes nothing.

    Returns:
        A ``Pruned<X>...`` model on the model's device, in its dtype and training mode (a PeftModel for a PeftModel).

    Raises:
        InvalidPlanError: the plan is for another architecture, or removes nothing.
        UnsupportedModelError: no family is registered for the model.
        AdapterError: an adapter can be neither sliced nor merged.
    """
    if is_peft(model):
        from .adapters import prune_peft

        return prune_peft(model, plan, allow_unchanged=allow_unchanged)
    model = unwrap(model)
    check_plan(model, plan, allow_unchanged)
    small = empty_like(model, plan)
    state = small_state(model.state_dict(), model, small, plan)
    small.load_state_dict(state, strict=True, assign=True)
    _copy_frozen_buffers(model, small, plan)
    cuts = find_cuts(model, small, plan)
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(model.get_parameter(cuts[name].source).requires_grad)
    return small.train(model.training)


def mask(model: Any, plan: PruningPlan) -> Any:
    """A full-size copy of ``model`` that computes what ``prune(model, plan)`` computes: removed units are zero.

    LayerNorms run over the kept residual channels. Useful to evaluate a plan, and to test the surgery. A PeftModel
    gives a plain model with its active adapters merged.

    Raises:
        InvalidPlanError: the plan is for another architecture.
        AdapterError: an adapter cannot be merged.
    """
    if is_peft(model):
        from .adapters import merged_twin

        model = merged_twin(model)
    model = unwrap(model)
    check_plan(model, plan, allow_unchanged=True)
    small = empty_like(model, plan)
    state = small_state(model.state_dict(), model, small, plan)
    full = copy.deepcopy(model)
    strip_gates(full)
    tensors = full.state_dict()
    with torch.no_grad():
        for name, cut in find_cuts(model, small, plan).items():
            if tensors[cut.source].is_floating_point():  # an index buffer of the small model has no place here
                tensors[cut.source].copy_(cut.scatter(state[name], tensors[cut.source].shape))
        for prefix in _removed_branches(model, plan):
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    tensor.zero_()
    if plan.embedding is not None:
        kept = torch.tensor(plan.embedding, device=next(full.parameters()).device)
        for norm in residual_norms(full, plan.source):
            mask_layer_norm(norm, kept)
    return full


def is_peft(model: Any) -> bool:
    """True for a PeftModel.

    Raises:
        AdapterError: adapters sit in the layers of a plain transformers model (``model.load_adapter``).
    """
    wrapped = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    if not wrapped and getattr(model, "_hf_peft_config_loaded", False):
        raise AdapterError(
            "the model holds adapters from add_adapter or load_adapter; load them with "
            "peft.PeftModel.from_pretrained(base, adapter) instead, which can be pruned"
        )
    return wrapped


def check_plan(model: PreTrainedModel, plan: PruningPlan, allow_unchanged: bool) -> None:
    """Refuse a plan made for another shape, or one that changes nothing.

    Raises:
        InvalidPlanError: with what differs.
    """
    plan.validated()
    actual = Architecture.of(model)
    if not plan.source.fits(actual):
        raise InvalidPlanError(
            f"the plan was made for a {plan.source.model_type} of {len(plan.source.layers)} layers and width "
            f"{plan.source.hidden_size} with its own layer sizes; this {actual.model_type} of {len(actual.layers)} "
            f"layers and width {actual.hidden_size} is another shape. Make the plan from this model."
        )
    unchanged = plan.removes_nothing and not plan.weights and not any(e.scales for e in plan.layers)
    if unchanged and not allow_unchanged:
        raise InvalidPlanError("the plan removes nothing: the pruned model would be the model itself")


def empty_like(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """The small model on the meta device, without weights."""
    info = dict(plan.info)
    base = getattr(model.config, "_name_or_path", "")
    if base:
        info.setdefault("base_model", base)
    info.update(lineage(model.config, plan))
    config = config_for(plan.architecture, model.config, info)
    _follow_backbone_stages(model, config, plan)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            small = pruned_model_class(type(model))(config)
    finally:
        torch.set_default_dtype(before)
    prefix = plan.source.family.encoder_path(model)
    if getattr(model.get_submodule(prefix.rstrip(".")), "pooler", 0) is None:
        encoder: Any = small.get_submodule(prefix.rstrip("."))
        encoder.pooler = None  # a base model made without its pooling layer
    return small


def small_state(
    big_state: Mapping[str, torch.Tensor], model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan
) -> dict[str, torch.Tensor]:
    """State dict of the small model, cut out of ``big_state`` (keys of ``model``).

    Raises:
        InvalidPlanError: a new weight of the plan has no place or another shape.
    """
    state = {name: cut.take(big_state[cut.source]) for name, cut in find_cuts(model, small, plan).items()}
    state.update(_input_indices(big_state, model, small, plan))
    expected = small.state_dict()
    for name, tensor in plan.weights.items():
        if name not in expected or expected[name].shape != tensor.shape:
            shape = tuple(expected[name].shape) if name in expected else None
            raise InvalidPlanError(
                f"the plan's new weight {name} is {tuple(tensor.shape)}, the small model has {shape}"
            )
        state[name] = tensor.to(state[name].device, state[name].dtype, copy=True)
    return state


def find_cuts(model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan) -> dict[str, Cut]:
    """Small tensor name -> its cut. Outside the layers, axes whose length differs follow the kept embedding."""
    source_paths = layer_paths(model, plan.source)
    small_paths = layer_paths(small, plan.architecture)
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    cuts: dict[str, Cut] = {}
    renamed = {new.layer: source_paths[e.index].layer for new, e in zip(small_paths, plan.layers, strict=True)}
    for name, tensor in small.state_dict().items():
        layer = next((new for new in renamed if name.startswith(new + ".")), None)
        source = name if layer is None else renamed[layer] + name[len(layer) :]
        if source in shapes and not name.endswith(".input_index"):
            cuts[name] = Cut(source)
            if layer is None and plan.embedding is not None:
                _cut_embedding(cuts[name], shapes[source], tensor.shape, plan)
    for entry, new, old in zip(plan.layers, small_paths, (source_paths[e.index] for e in plan.layers), strict=True):
        _cut_layer(cuts, entry, new, old, plan)
    return cuts


def _cut_embedding(cut: Cut, full: torch.Size, small: torch.Size, plan: PruningPlan) -> None:
    kept = torch.tensor(plan.embedding)
    width = plan.source.hidden_size
    for axis, (before, after) in enumerate(zip(full, small, strict=True)):
        if before != after:
            # a classifier on several pooled vectors side by side repeats the residual width
            cut.index[axis] = torch.cat([kept + width * i for i in range(before // width)])


def _cut_layer(cuts: dict[str, Cut], entry: LayerPlan, new: LayerPaths, old: LayerPaths, plan: PruningPlan) -> None:
    source = plan.source.layers[entry.index]

    def cut(path: str, axis: int, index: torch.Tensor | None, scale: tuple[float, ...] | None = None) -> None:
        for suffix in ("weight", "bias", "lambda1"):
            name = f"{path}.{suffix}"
            if name in cuts and not (axis == 1 and suffix != "weight"):
                if index is not None:
                    cuts[name].index[axis] = index
                if scale is not None:
                    cuts[name].scale[axis] = torch.tensor(scale, dtype=torch.float64)

    kept = None if plan.embedding is None else torch.tensor(plan.embedding)
    norms = [new.norm1, new.norm2, new.scale1, new.scale2, new.o, new.fc2]
    for path in norms:
        if path is not None and kept is not None:
            cut(path, 0, kept)
    if entry.mixer == "attention":
        inputs = kept if entry.attention_in is None else torch.tensor(entry.attention_in)
        qk = _rows(entry.heads, entry.qk, source.qk_dim)
        v = _rows(entry.heads, entry.v, source.v_dim)
        for path, rows in ((new.q, qk), (new.k, qk), (new.v, v)):
            cut(path, 0, rows)
            cut(path, 1, inputs, entry.scales.get("attention_in"))
        cut(new.o, 1, v, entry.scales.get("v"))
        if new.bias_table:
            cuts[new.bias_table].index[1] = torch.tensor(entry.heads)
    if entry.mlp:
        neurons = torch.tensor(entry.mlp)
        inputs = kept if entry.mlp_in is None else torch.tensor(entry.mlp_in)
        for path in new.fc1:
            cut(path, 0, neurons)
            cut(path, 1, inputs, entry.scales.get("mlp_in"))
        cut(new.fc2, 1, neurons, entry.scales.get("mlp"))


def _rows(heads: tuple[int, ...], channels: tuple[tuple[int, ...], ...], size: int) -> torch.Tensor:
    """Rows of a projection, heads concatenated, :data:`PAD` where a head has fewer channels."""
    return torch.tensor(
        [PAD if c == PAD else h * size + c for h, row in zip(heads, channels, strict=True) for c in row]
    )


def _input_indices(
    big_state: Mapping[str, torch.Tensor], model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan
) -> dict[str, torch.Tensor]:
    """Values of the small model's ``input_index`` buffers: the residual channels its parts read."""
    old_paths, new_paths = layer_paths(model, plan.source), layer_paths(small, plan.architecture)
    expected = small.state_dict()
    device = next(model.parameters()).device
    values: dict[str, torch.Tensor] = {}
    for entry, new in zip(plan.layers, new_paths, strict=True):
        old = old_paths[entry.index]
        for new_part, old_part, kept in (
            (new.attention, old.attention, entry.attention_in),
            (new.mlp, old.mlp, entry.mlp_in),
        ):
            name = f"{new_part}.input_index"
            if name in expected:
                before = big_state.get(f"{old_part}.input_index")
                if kept is None:
                    values[name] = big_state[f"{old_part}.input_index"].clone()
                else:
                    index = torch.tensor(kept, device=device)
                    values[name] = index if before is None else before[index]
    for name in expected:
        if name.endswith("input_index") and name not in values:  # a part that keeps its width over a narrowed stream
            kept_channels = torch.tensor(plan.embedding or range(plan.source.hidden_size), device=device)
            values[name] = big_state[name][kept_channels] if name in big_state else kept_channels
    return values


def _removed_branches(model: PreTrainedModel, plan: PruningPlan) -> list[str]:
    """Prefixes of the parameters that write a removed branch into the residual stream."""
    paths = layer_paths(model, plan.source)
    kept = {entry.index: entry for entry in plan.layers}
    prefixes = []
    for i, (path, shape) in enumerate(zip(paths, plan.source.layers, strict=True)):
        entry = kept.get(i)
        if shape.mixer == "attention" and (entry is None or entry.mixer == "none"):
            prefixes.append(f"{path.o}.")
        if shape.mlp and (entry is None or not entry.mlp):
            prefixes.append(f"{path.fc2}.")
    return prefixes


def residual_norms(model: nn.Module, architecture: Architecture) -> list[nn.Module]:
    """Every LayerNorm that runs over the residual stream."""
    family = architecture.family
    prefix = family.encoder_path(model)
    names = [prefix + name for name in family.norms]
    for paths, shape in zip(layer_paths(model, architecture), architecture.layers, strict=True):  # type: ignore[arg-type]
        names += [paths.norm1] if shape.mixer != "none" else []
        names += [paths.norm2] if shape.mlp else []
    return [model.get_submodule(name) for name in names]


def _follow_backbone_stages(model: PreTrainedModel, config: Any, plan: PruningPlan) -> None:
    """Backbones name the layers whose output they give; the names follow the layers.

    Raises:
        InvalidPlanError: a layer whose output is asked for is removed.
    """
    if not type(model).__name__.endswith("Backbone") or plan.source.depths is not None:
        return
    position = {entry.index: j for j, entry in enumerate(plan.layers)}
    names = []
    for index in model.config.out_indices:
        index = index % (len(plan.source.layers) + 1)
        if index > 0 and index - 1 not in position:
            raise InvalidPlanError(
                f"the plan removes layer {index - 1}, whose output this backbone gives (out_features)"
            )
        names.append("stem" if index == 0 else f"stage{position[index - 1] + 1}")
    config.set_output_features_output_indices(out_features=names, out_indices=None)


def _copy_frozen_buffers(model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan) -> None:
    """Buffers that are not saved (position indices) depend on no size that a plan changes."""
    old_paths, new_paths = layer_paths(model, plan.source), layer_paths(small, plan.architecture)
    renamed = {new.layer: old_paths[e.index].layer for new, e in zip(new_paths, plan.layers, strict=True)}
    source = dict(model.named_buffers())
    for name, buffer in list(small.named_buffers()):
        if buffer.device.type == "meta":
            layer = next((new for new in renamed if name.startswith(new + ".")), None)
            old = source[name if layer is None else renamed[layer] + name[len(layer) :]]
            parent, _, leaf = name.rpartition(".")
            small.get_submodule(parent).register_buffer(leaf, old.clone(), persistent=False)


def truncate(model: Any, k: int) -> Any:
    """Keep the first ``k`` layers, then the unchanged final norm and head.

    Raises:
        InvalidPlanError: ``k`` is not in 1..layers-1, or leaves a stage empty (Swin).
    """
    plan = PruningPlan.dense(model)
    total = len(plan.layers)
    if type(k) is not int or not 1 <= k < total:
        raise InvalidPlanError(f"k is a whole number of layers in 1..{total - 1}, got {k!r}")
    depths = plan.source.depths
    if depths is not None and k <= total - depths[-1]:
        raise InvalidPlanError(
            f"keeping {k} of {total} layers leaves a stage of {plan.source.model_type} empty (stages of {depths}); "
            f"k must be over {total - depths[-1]}"
        )
    return prune(model, plan.keep_layers(range(k)))
