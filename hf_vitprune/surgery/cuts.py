"""Where every tensor of a small model comes from in the big one, and which indices stay along which axis."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InvalidPlanError
from ..families import LayerPaths
from ..modeling.structure import layer_paths
from ..plan.layer_plan import PAD, LayerPlan
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture
from ..spec.units import Axis, layer_axes, unit_table
from ..utils.offload import input_device

#: buffers of a small model that say which channels it reads or turns
INDICES = (".input_index", ".qk_index")


@dataclass
class Cut:
    """Where one tensor of the small model comes from: ``source`` indexed by ``index[axis]``, times ``scale[axis]``.

    An index of :data:`PAD` stands for zeros.
    """

    source: str
    index: dict[int, torch.Tensor] = field(default_factory=dict)
    scale: dict[int, torch.Tensor] = field(default_factory=dict)

    def changes(self, shape: torch.Size) -> bool:
        """Whether what is taken of a tensor of this shape can differ from it."""
        return bool(self.scale) or any(i.tolist() != [*range(shape[axis])] for axis, i in self.index.items())

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


def small_state(
    big_state: Mapping[str, torch.Tensor],
    model: PreTrainedModel,
    small: PreTrainedModel,
    plan: PruningPlan,
    given_away: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """State dict of the small model, cut out of ``big_state`` (keys of ``model``).

    Args:
        given_away: new weights of the plan that need not be copied.
    """
    cuts = find_cuts(model, small, plan)
    state = {name: cut.take(big_state[cut.source]) for name, cut in cuts.items() if name not in plan.weights}
    state.update(_indices(big_state, model, small, plan))
    return state | new_weights(model, small, plan, cuts, given_away)


def new_weights(
    model: PreTrainedModel,
    small: PreTrainedModel,
    plan: PruningPlan,
    cuts: Mapping[str, Cut],
    given_away: Collection[str] = (),
) -> dict[str, torch.Tensor]:
    """The plan's new weights on the model's device and in its dtype; arguments as in :func:`small_state`."""
    expected, held = small.state_dict(), model.state_dict()
    missing = sorted(n for n in expected.keys() - cuts.keys() - plan.weights.keys() if not n.endswith(INDICES))
    if missing:
        raise InvalidPlanError(
            f"the plan makes new mixers and lacks {len(missing)} of their weights (first: {missing[0]})"
        )
    found = {}
    for name, tensor in plan.weights.items():
        if name not in expected or expected[name].shape != tensor.shape:
            shape = tuple(expected[name].shape) if name in expected else None
            raise InvalidPlanError(
                f"the plan's new weight {name} is {tuple(tensor.shape)}, the small model has {shape}"
            )
        like = held[cuts[name].source] if name in cuts else expected[name]
        found[name] = tensor.to(_device(model, like), like.dtype, copy=name not in given_away)
    return found


def _device(model: PreTrainedModel, like: torch.Tensor | None) -> torch.device:
    return input_device(model) if like is None or like.is_meta else like.device


def find_cuts(model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan) -> dict[str, Cut]:
    """Small tensor name -> its cut. Outside the layers, axes whose length differs follow the kept embedding.

    Tensors of mixers that the plan makes have none: they are among its new weights.
    """
    small_paths = layer_paths(small, plan.architecture)
    renamed = renamed_layers(layer_paths(model, plan.source), small_paths, [entry.index for entry in plan.layers])
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    cuts: dict[str, Cut] = {}
    new_mixers = tuple(
        f"{paths.attention}."
        for paths, e in zip(small_paths, plan.layers, strict=True)
        if e.replaces_mixer(plan.source.layers[e.index])
    )
    for name, tensor in small.state_dict().items():
        if name.startswith(new_mixers):
            continue
        source, outside = source_name(name, renamed), not name.startswith(tuple(renamed))
        if source in shapes and not name.endswith(INDICES):
            cuts[name] = Cut(source)
            if outside and plan.embedding is not None:
                for i, before in enumerate(shapes[source]):
                    if before != tensor.shape[i]:
                        kept = torch.tensor(plan.embedding)
                        cuts[name].index[i] = side_by_side(kept, plan.source.hidden_size, before)
    for j, paths in enumerate(small_paths):
        _cut_layer(cuts, plan.layers[j], plan.source, layer_axes(plan.architecture, j, paths))
    if plan.embedding is not None:
        for axis in unit_table(plan.architecture, small_paths, cuts.keys())["embedding"]:
            if axis.layer is not None:
                cuts[axis.tensor].index[axis.axis] = torch.tensor(plan.embedding)
    return cuts


def renamed_layers(old: Sequence[LayerPaths], new: Sequence[LayerPaths], kept: Iterable[int]) -> dict[str, str]:
    """Prefix of a layer in the small model -> that of the layer in the big one which it is made of."""
    return {f"{paths.layer}.": f"{old[index].layer}." for paths, index in zip(new, kept, strict=True)}


def source_name(name: str, renamed: Mapping[str, str]) -> str:
    """What a tensor of the small model is called in the big one."""
    layer = next((new for new in renamed if name.startswith(new)), "")
    return renamed.get(layer, "") + name[len(layer) :]


def side_by_side(kept: torch.Tensor, width: int, length: int) -> torch.Tensor:
    """Indices of the kept channels where the stream stands several times side by side (several pooled vectors)."""
    return torch.cat([kept + width * i for i in range(length // width)])


def _cut_layer(cuts: dict[str, Cut], entry: LayerPlan, source: Architecture, axes: dict[str, list[Axis]]) -> None:
    """What stays of every unit of one layer, along every axis that carries it, and factors of what reads them."""
    # of a head, its channels are kept one by one; what is left of the unit are tensors with one value a head
    kept: dict[str, Any] = {"heads": entry.heads, "mlp": entry.mlp}
    if entry.mixer == "attention":
        kept |= {"qk": _qk_rows(entry, source), "v": _rows(entry.heads, entry.v, source.layers[entry.index].v_dim)}
    kept |= {"attention_in": entry.attention_in, "mlp_in": entry.mlp_in}
    for unit, index in kept.items():
        for axis in axes.get(unit, ()):
            cut = cuts.get(axis.tensor)
            if cut is not None and index is not None:
                cut.index[axis.axis] = torch.as_tensor(index)
            if cut is not None and unit in entry.scales and axis.axis == 1:
                cut.scale[1] = torch.tensor(entry.scales[unit], dtype=torch.float64)


def _qk_rows(entry: LayerPlan, source: Architecture) -> torch.Tensor:
    """Rows of the queries; where a head keeps its full width and is turned, every channel stays in its own place."""
    size, rows = source.layers[entry.index].qk_dim, entry.qk
    if source.family.rotate is not None and len(rows[0]) == source.head_dim(entry.index):
        rows = tuple(tuple(c if c in row else PAD for c in range(size)) for row in rows)
    return _rows(entry.heads, rows, size)


def _rows(heads: tuple[int, ...], channels: tuple[tuple[int, ...], ...], size: int) -> torch.Tensor:
    """Rows of a projection, heads concatenated, :data:`PAD` where a head has fewer channels."""
    return torch.tensor(
        [PAD if c == PAD else h * size + c for h, row in zip(heads, channels, strict=True) for c in row]
    )


def _indices(
    big_state: Mapping[str, torch.Tensor], model: PreTrainedModel, small: PreTrainedModel, plan: PruningPlan
) -> dict[str, torch.Tensor]:
    """Values of the small model's index buffers: the residual channels that its parts read, those that it turns."""
    old_paths, new_paths = layer_paths(model, plan.source), layer_paths(small, plan.architecture)
    stream = plan.embedding or range(plan.source.hidden_size)
    kept: dict[str, tuple[str, Any]] = {}  # name -> that in the big model, and what stays of it (None: all)
    for entry, new in zip(plan.layers, new_paths, strict=True):
        old, shape = old_paths[entry.index], plan.source.layers[entry.index]
        kept[f"{new.mlp}.input_index"] = f"{old.mlp}.input_index", entry.mlp_in
        kept[f"{new.attention}.input_index"] = f"{old.attention}.input_index", entry.attention_in
        if entry.qk:
            turned = f"{old.attention}.qk_index"
            rows = _qk_rows(entry, plan.source).clamp(min=0)  # what pads is zero, however it is turned
            kept[f"{new.attention}.qk_index"] = turned, rows if turned in big_state else rows % shape.qk_dim
    values: dict[str, torch.Tensor] = {}
    for name in small.state_dict():
        if name.endswith(INDICES):
            # a part outside the layers that keeps its width reads the whole stream
            source, chosen = kept.get(name, (name, stream))
            before = big_state.get(source)
            if chosen is None:
                values[name] = big_state[source].clone()
            else:
                like = next(model.get_submodule(source.rpartition(".")[0]).parameters(), None)
                index = torch.as_tensor(chosen, device=_device(model, like))
                values[name] = index if before is None else before[index]
    return values
