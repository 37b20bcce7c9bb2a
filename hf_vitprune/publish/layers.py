"""What every layer of a model is made of, and how much of it pruning left: plain data for tables, plots and pages."""

from __future__ import annotations

from typing import Any

from ..cost import cost_parts
from ..plan.plan import PruningPlan
from ..spec.architecture import Architecture, dense_of
from ..spec.units import LAYER_UNITS, layer_sizes

_OUTSIDE = "other"


def layer_rows(model: Any, image_size: int | tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """One dict a layer, and one of what lies outside the layers, as plain data.

    Keys: ``layer`` (index, or ``"other"``), ``stage`` (Swin), ``mixer``, ``heads``, ``qk``, ``v``, ``mlp``,
    ``conv_channels`` (None: no convolution), ``attention_in`` and ``mlp_in`` (None: all channels), ``params``,
    ``macs`` and ``share`` (of all multiply-adds).

    Args:
        model: a model or an Architecture.
        image_size: side, or (height, width), in pixels; the config's by default.

    Raises:
        UnsupportedModelError: no family is registered for the model.
    """
    architecture = model if isinstance(model, Architecture) else Architecture.of(model)
    costs: dict[Any, list[int]] = {}
    for part in cost_parts(architecture, image_size):
        words = part.name.split()
        key = int(words[1]) if words[0] == "layer" else _OUTSIDE
        row = costs.setdefault(key, [0, 0])
        row[0] += part.weights + part.others
        row[1] += part.macs
    total = sum(macs for _, macs in costs.values())
    rows: list[dict[str, Any]] = []
    for key, (params, macs) in costs.items():
        sizes = _sizes(architecture, key) if key != _OUTSIDE else {}
        rows.append({"layer": key, **sizes, "params": params, "macs": macs, "share": macs / total if total else 0.0})
    return rows


def _sizes(architecture: Architecture, layer: int) -> dict[str, Any]:
    shape = architecture.layers[layer]
    stage = {} if architecture.depths is None else {"stage": architecture.stages[layer]}
    return {
        **stage,
        "mixer": shape.mixer,
        **{unit: getattr(shape, field) for unit, field in LAYER_UNITS.items()},
        **{name: getattr(shape, name) for name in ("conv_channels", "attention_in", "mlp_in")},
    }


def kept_shares(subject: PruningPlan | Architecture | Any) -> dict[str, list[float]]:
    """Unit -> share of it that each layer keeps, bottom to top.

    A plan is compared with the model that it is for, and removed layers keep 0. An architecture or a model does not
    know which layers are gone: each of its own is compared with a dense one. ``attention_in`` and ``mlp_in`` are
    there only where a layer has them.
    """
    if isinstance(subject, PruningPlan):
        reference, positions = subject.source, [entry.index for entry in subject.layers]
        architecture = subject.architecture
    else:
        architecture = subject if isinstance(subject, Architecture) else Architecture.of(subject)
        reference = dense_of(architecture.config, architecture.task)
        places = _places(reference)
        positions = [places.index(place) for place in _places(architecture)]
    shares = {name: [0.0] * len(reference.layers) for name in layer_sizes()}
    seen = {name: not name.endswith("_in") for name in shares}
    for i, position in enumerate(positions):
        kept, full = _sizes(architecture, i), _sizes(reference, position)
        for name in shares:
            width = full[name] if full[name] is not None else reference.width(position)
            size = kept[name] if kept[name] is not None else architecture.width(i)
            seen[name] |= kept[name] is not None
            shares[name][position] = size / width if width else 0.0
    if not isinstance(subject, PruningPlan):
        shares = {name: [row[position] for position in positions] for name, row in shares.items()}
    return {name: row for name, row in shares.items() if seen[name]}


def _places(architecture: Architecture) -> list[tuple[int, int]]:
    """(stage, position in the stage) of every layer."""
    stages = architecture.stages
    return [(stage, stages[:i].count(stage)) for i, stage in enumerate(stages)]
