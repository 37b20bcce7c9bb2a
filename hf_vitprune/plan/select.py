"""Plans from scores: the same share cut from every set, by any criterion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import InvalidPlanError, UnsupportedUnitError
from ..modeling.peft_twin import is_peft, merged_twin
from ..spec.architecture import Architecture, unwrap
from .layer_plan import Indices, LayerPlan

#: (name of the set, number of units) -> score of every unit; the lowest go
Scores = Callable[[str, int], torch.Tensor]

DEFAULT_UNITS = ("heads", "qk", "v", "mlp", "embedding")


def check_ratio(ratio: float) -> float:
    """A ratio in (0, 1).

    Raises:
        InvalidPlanError: it is not.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1 or math.isnan(ratio):
        raise InvalidPlanError(f"the ratio of units to remove must lie strictly between 0 and 1, got {ratio!r}")
    return float(ratio)


def check_units(architecture: Architecture, units: Sequence[str] | None) -> tuple[str, ...]:
    """Units that the family has; by default all five sizes.

    Raises:
        UnsupportedUnitError: naming the unit and what the family has.
    """
    known = architecture.family.units
    if units is None:
        return tuple(u for u in DEFAULT_UNITS if u in known)
    if isinstance(units, str) or not units:
        raise UnsupportedUnitError(f"units is a non-empty list of {', '.join(sorted(known))}, got {units!r}")
    for unit in units:
        if unit not in known:
            raise UnsupportedUnitError(
                f"{architecture.model_type} models have no prunable unit {unit!r}; "
                f"they have {', '.join(sorted(known))}"
            )
    return tuple(units)


def keep_count(size: int, ratio: float, round_to: int, what: str) -> int:
    """Units that stay of ``size``, rounded to the nearest multiple of ``round_to`` that is not over ``size``.

    Raises:
        InvalidPlanError: nothing would stay.
    """
    kept = round(size * (1 - ratio) / round_to) * round_to
    if kept > size:
        kept = size // round_to * round_to
    if kept < 1:
        raise InvalidPlanError(
            f"{what}: removing {ratio:.0%} of {size} (rounded to {round_to}) empties the set; "
            "lower the ratio or round_to"
        )
    return kept


def best(scores: torch.Tensor, count: int) -> tuple[int, ...]:
    """Positions of the ``count`` highest scores, ascending; ties go to the lower position."""
    order = torch.argsort(scores.double(), descending=True, stable=True)
    return tuple(sorted(order[:count].tolist()))


def cut_every_set(
    source: Architecture, ratio: float, units: Sequence[str] | None, round_to: int, scores: Scores
) -> tuple[tuple[LayerPlan, ...], Indices | None]:
    """Keep all but the ``ratio`` lowest-scored units of every set; see :meth:`PruningPlan.random` for the arguments.

    Returns:
        Kept layers, and kept residual channels (None: all).
    """
    ratio = check_ratio(ratio)
    chosen = check_units(source, units)
    if type(round_to) is not int or round_to < 1:
        raise InvalidPlanError(f"round_to is a whole number of at least 1, got {round_to!r}")

    def cut(name: str, size: int, rounding: int) -> Indices:
        return best(scores(name, size), keep_count(size, ratio, rounding, name))

    kept = _cut_layers(source, ratio, scores) if "layers" in chosen else range(len(source.layers))
    layers = tuple(_cut_layer(LayerPlan.dense(i, source.layers[i]), source, chosen, round_to, cut) for i in kept)
    return layers, cut("embedding", source.hidden_size, round_to) if "embedding" in chosen else None


def _cut_layers(source: Architecture, ratio: float, scores: Scores) -> list[int]:
    kept: list[int] = []
    start = 0
    for stage, depth in enumerate(source.depths or (len(source.layers),)):
        name = f"stage {stage} layers" if source.depths else "layers"
        kept += [start + i for i in best(scores(name, depth), keep_count(depth, ratio, 1, name))]
        start += depth
    return kept


def _cut_layer(
    entry: LayerPlan,
    source: Architecture,
    units: tuple[str, ...],
    round_to: int,
    cut: Callable[[str, int, int], tuple[int, ...]],
) -> LayerPlan:
    shape = source.layers[entry.index]
    name = f"layer {entry.index}"
    if shape.mixer == "attention":
        for unit, size in (("qk", shape.qk_dim), ("v", shape.v_dim)):
            if unit in units:
                entry = entry.keep_channels(unit, cut(f"{name} {unit}", size, round_to))
        if "heads" in units:
            entry = entry.keep_heads(cut(f"{name} heads", shape.heads, 1))
    if "mlp" in units and shape.mlp:
        entry = replace(entry, mlp=cut(f"{name} mlp", shape.mlp, round_to))
    return entry


def l2_scores(model: Any) -> Scores:
    """L2 norm of the weights of every unit (a matrix that a unit writes or reads counts once).

    Weights of a PeftModel are those with its active adapters merged.
    """
    base = merged_twin(model) if is_peft(model) else unwrap(model)
    architecture = Architecture.of(base)
    family = architecture.family
    prefix = family.encoder_path(base)
    paths = [family.layer_paths(prefix, name, base.config) for name in architecture.layer_names()]
    state = {k: v.detach() for k, v in base.state_dict().items()}
    squares: dict[str, torch.Tensor] = {}

    def rows(name: str) -> torch.Tensor:
        return state[f"{name}.weight"].double().square().sum(1)

    def columns(name: str) -> torch.Tensor:
        return state[f"{name}.weight"].double().square().sum(0)

    embedding = torch.zeros(architecture.hidden_size, dtype=torch.float64)
    for i, (path, shape) in enumerate(zip(paths, architecture.layers, strict=True)):
        total = torch.zeros(1, dtype=torch.float64)
        same_width = "embedding" in family.units and shape.attention_in is None and shape.mlp_in is None
        if shape.mixer == "attention":
            qk = (rows(path.q) + rows(path.k)).view(shape.heads, shape.qk_dim)
            v = (rows(path.v) + columns(path.o)).view(shape.heads, shape.v_dim)
            squares[f"layer {i} qk"], squares[f"layer {i} v"] = qk.sum(0), v.sum(0)
            squares[f"layer {i} heads"] = qk.sum(1) + v.sum(1)
            total = total + qk.sum() + v.sum()
            if same_width:
                embedding += columns(path.q) + columns(path.k) + columns(path.v) + rows(path.o)
        elif shape.kernel:
            kernel = state[f"{path.attention}.conv.weight"].double().square()
            total = total + kernel.sum() + rows(path.o).sum()
            if same_width:
                embedding += kernel.sum((0, 2, 3)) + rows(path.o)
        if shape.mlp:
            hidden = sum((rows(name) for name in path.fc1), columns(path.fc2))
            squares[f"layer {i} mlp"] = hidden
            total = total + hidden.sum()
            if same_width:
                embedding += sum((columns(name) for name in path.fc1), rows(path.fc2))
        squares[f"layer {i}"] = total
    squares["embedding"] = embedding
    starts = [0]
    for depth in architecture.depths or (len(architecture.layers),):
        starts.append(starts[-1] + depth)
    for stage, (start, end) in enumerate(itertools.pairwise(starts)):
        name = f"stage {stage} layers" if architecture.depths else "layers"
        squares[name] = torch.cat([squares[f"layer {i}"] for i in range(start, end)])
    return lambda name, count: squares[name].sqrt()
