"""The one table of units: the sets of a model, and every axis of a tensor that carries one of them.

A *set* holds units that are alike and can replace each other: the heads of a layer, its q/k channels (the same in
every head; in pairs where rotary positions turn them together), its v channels, its neurons; the residual channels
(``embedding``); the layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from ..errors import UnsupportedUnitError
from ..families import LayerPaths
from .architecture import Architecture
from .layer_shape import LayerShape

#: units inside a layer -> name of their number in the layer's shape
LAYER_UNITS = {"qk": "qk_dim", "v": "v_dim", "heads": "heads", "mlp": "mlp"}
#: all that make a model narrower, as options and errors list them
DEFAULT_UNITS = ("heads", "qk", "v", "mlp", "embedding")


def layer_sizes() -> dict[str, str]:
    """Units inside a layer, and what its branches read (``attention_in``, ``mlp_in``) -> title in tables and plots."""
    units = {field: unit for unit, field in LAYER_UNITS.items()}
    titles = {units.get(field.name, field.name): field.metadata["title"] for field in fields(LayerShape)}
    return {name: title for name, title in titles.items() if title}


def channels_of(shape: LayerShape, name: str, width: int) -> int:
    """Channels of a layer that a plan chooses from (``name``: as in :func:`layer_sizes`): of all heads, for qk and v.

    ``width``: of the residual stream, which a branch reads whole where its shape says nothing else.
    """
    size: int | None = getattr(shape, LAYER_UNITS.get(name, name))
    return (width if size is None else size) * (shape.heads if name in ("qk", "v") else 1)


def units_in(shape: LayerShape) -> tuple[str, ...]:
    """Units that a layer of this shape has, and what its branches read of the residual stream."""
    attention = ("attention_in", "qk", "v", "heads") if shape.mixer == "attention" else ()
    return (*attention, *(("mlp_in", "mlp") if shape.mlp else ()))


@dataclass(frozen=True)
class UnitSet:
    """A set of units."""

    #: ``layer 3 heads``, ``embedding``, ``layers``
    name: str
    #: ``qk``, ``v``, ``heads``, ``mlp``, ``embedding`` or ``layers``
    unit: str
    #: that it belongs to; None for ``embedding`` and ``layers``
    layer: int | None
    size: int
    #: of a head that a q/k unit is: two where rotary positions turn pairs of them
    channels: int = 1


class Axis(NamedTuple):
    """An axis of a tensor along which a set of units lies.

    Unit ``u`` of ``n`` is at the places ``(r * n + u) * run + i`` for every ``r`` under ``repeats`` and ``i`` under
    ``run``: a head is a run of channels, a q/k channel comes again in every head.
    """

    #: name of the parameter, from the task model
    tensor: str
    axis: int
    repeats: int = 1
    run: int = 1
    #: that the tensor is in; None outside the layers
    layer: int | None = None

    @property
    def module(self) -> str:
        """Path of the module that has the tensor."""
        return self.tensor.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Of the tensor in its module."""
        return self.tensor.rpartition(".")[2]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """(units,) sums over all values of a unit; ``values`` have the tensor's shape."""
        along = values.movedim(self.axis, 0).flatten(1).sum(1) if values.ndim > 1 else values
        return along.reshape(self.repeats, -1, self.run).sum((0, 2))

    def places(self, units: Sequence[int], size: int) -> torch.Tensor:
        """Indices along the axis of some units, of a set of ``size``, in the order given within every repeat."""
        starts = torch.arange(self.repeats)[:, None] * size + torch.tensor(list(units), dtype=torch.long)
        return (starts[..., None] * self.run + torch.arange(self.run)).flatten()


def set_name(unit: str, layer: int | None = None) -> str:
    """Name of a set."""
    return unit if layer is None else f"layer {layer} {unit}"


def has_embedding_set(architecture: Architecture) -> bool:
    """Whether residual channels can be removed: not where parts of the model read some of them only."""
    whole = all(shape.attention_in is None and shape.mlp_in is None for shape in architecture.layers)
    return whole and "embedding" in architecture.units


def channels_per_unit(architecture: Architecture, unit: str) -> int:
    """Channels of a head that go together: the two of a pair, where queries and keys are turned."""
    return 2 if unit == "qk" and architecture.family.qk_pairs else 1


def unit_sets(architecture: Architecture) -> dict[str, UnitSet]:
    """Every set of a model, by its name: the layers, then layer by layer what is in them, then the embedding."""
    sets = [UnitSet("layers", "layers", None, len(architecture.layers))]
    for i, shape in enumerate(architecture.layers):
        for unit in (unit for unit in units_in(shape) if unit in LAYER_UNITS):
            channels = channels_per_unit(architecture, unit)
            size = getattr(shape, LAYER_UNITS[unit]) // channels
            sets.append(UnitSet(set_name(unit, i), unit, i, size, channels))
    if has_embedding_set(architecture):
        sets.append(UnitSet("embedding", "embedding", None, architecture.hidden_size))
    return {one.name: one for one in sets}


def layer_axes(architecture: Architecture, i: int, path: LayerPaths) -> dict[str, list[Axis]]:
    """Units of a layer, and what its branches read (``attention_in``, ``mlp_in``) -> every axis that carries them."""
    shape, pairs = architecture.layers[i], channels_per_unit(architecture, "qk")

    def rows(linears: Sequence[str], repeats: int = 1, run: int = 1) -> list[Axis]:
        return [axis for linear in linears for axis in _rows(linear, repeats, run, i)]

    def columns(linears: Sequence[str], repeats: int = 1, run: int = 1) -> list[Axis]:
        return [Axis(f"{linear}.weight", 1, repeats, run, i) for linear in linears]

    axes = {}
    if shape.mixer == "attention":
        queries_keys, v, o = (path.q, path.k), (path.v,), (path.o,)
        axes["attention_in"] = columns((*queries_keys, *v))
        axes["qk"] = rows(queries_keys, shape.heads * pairs)
        axes["v"] = rows(v, shape.heads) + columns(o, shape.heads)
        axes["heads"] = rows(queries_keys, 1, shape.qk_dim) + rows(v, 1, shape.v_dim) + columns(o, 1, shape.v_dim)
        axes["heads"] += [Axis(name, axis, layer=i) for name, axis in path.per_head]
    if shape.mlp:
        axes["mlp_in"] = columns(path.fc1)
        axes["mlp"] = rows(path.fc1) + columns((path.fc2,))
    return axes


def unit_table(
    architecture: Architecture, paths: Sequence[LayerPaths], names: Collection[str] | None = None
) -> dict[str, list[Axis]]:
    """Set -> every axis that carries it, but for ``layers``: a layer takes all tensors below its path with it.

    Outside the layers, the axes of ``embedding`` are those that the family names (patch projection and norms).
    Tokens, positions and heads are not in its description.

    Args:
        architecture: of the model.
        paths: of its layers (``modeling.structure.layer_paths``).
        names: of the model's parameters: axes of tensors that it does not have (biases) are left out. None: all.
    """
    layers = [layer_axes(architecture, i, path) for i, path in enumerate(paths)]
    table: dict[str, list[Axis]] = {}
    for name, one in unit_sets(architecture).items():
        if one.unit != "layers":
            table[name] = _embedding(architecture, paths, layers) if one.layer is None else layers[one.layer][one.unit]
    if names is not None:
        table = {one: [axis for axis in axes if axis.tensor in names] for one, axes in table.items()}
    return table


def _rows(linear: str, repeats: int = 1, run: int = 1, layer: int | None = None) -> list[Axis]:
    """What a module computes: the rows of its weight, and its bias."""
    return [Axis(f"{linear}.{name}", 0, repeats, run, layer) for name in ("weight", "bias")]


def _embedding(
    architecture: Architecture, paths: Sequence[LayerPaths], layers: Sequence[dict[str, list[Axis]]]
) -> list[Axis]:
    family = architecture.family
    prefix = paths[0].layer.removesuffix(architecture.layer_names()[0])
    axes = [axis for name in family.norms for axis in _rows(prefix + name)]
    axes += [Axis(f"{prefix}{family.patch}.weight", family.stem_axis), Axis(f"{prefix}{family.patch}.bias", 0)]
    for i, (path, shape, own) in enumerate(zip(paths, architecture.layers, layers, strict=True)):
        if shape.mixer != "none":
            axes += _rows(path.norm1, layer=i)
            axes += [Axis(path.scale1, 0, layer=i)] if path.scale1 else []
        axes += own.get("attention_in", [])
        if shape.kernel:
            axes.append(Axis(f"{path.attention}.conv.weight", 1, layer=i))
        if shape.mixer == "attention" or shape.kernel:
            axes += _rows(path.o, layer=i)
        if shape.mlp:
            axes += _rows(path.norm2, layer=i) + own["mlp_in"] + _rows(path.fc2, layer=i)
            axes += [Axis(path.scale2, 0, layer=i)] if path.scale2 else []
    return axes


def check_units(architecture: Architecture, units: Collection[str] | None) -> tuple[str, ...]:
    """Units that the family has, by default all five sizes; UnsupportedUnitError names what it has not."""
    known = architecture.units
    if units is None:
        return tuple(u for u in DEFAULT_UNITS if u in known)
    if isinstance(units, str) or not isinstance(units, Collection) or not units:
        raise UnsupportedUnitError(f"units is a non-empty list of {', '.join(sorted(known))}, got {units!r}")
    for unit in units:
        if unit not in known:
            why = architecture.family.refused_units(architecture.config).get(unit)
            raise UnsupportedUnitError(
                f"{architecture.model_type} models have no prunable unit {unit!r}{f' ({why})' if why else ''}; "
                f"they have {', '.join(sorted(known))}"
            )
    return tuple(units)
