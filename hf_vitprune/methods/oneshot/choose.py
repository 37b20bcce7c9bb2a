"""From scores to the best plan at a target: options of every branch with their cost and error, then the knapsack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ...cost.meter import CostMeter
from ...errors import InvalidConfigError, UnreachableTargetError, UnsupportedUnitError
from ...plan.layer_plan import LayerPlan
from ...plan.plan import PruningPlan
from ...plan.select import say_if_far_under
from ...plan.uniform import StockSizes
from ...spec.architecture import Architecture
from ...spec.layer_shape import LayerShape
from ...spec.units import DEFAULT_UNITS, LAYER_UNITS, check_units
from ...utils.settings import check_count
from ..base import PruningConfig
from .allocate import Options, allocate
from .folds import of_layer
from .settings import OneShotSettings

#: what can be scored and chosen
UNITS = tuple(unit for unit in DEFAULT_UNITS if unit in LAYER_UNITS)


class Branch(NamedTuple):
    """A branch of a layer and what it may become: sizes, one row an option, and how an option goes into the plan."""

    layer: int
    sizes: Sequence[tuple[int, ...]]
    options: Options
    apply: Callable[[LayerPlan, tuple[int, ...]], LayerPlan]


class Goal(NamedTuple):
    """A target that can be reached, and the sizes that may be chosen for it."""

    target: float
    meter: CostMeter
    units: tuple[str, ...]
    round_to: int
    settings: OneShotSettings
    #: sizes that a stock class holds, where all layers shall have the same
    stock: StockSizes | None = None


def check_target(
    architecture: Architecture,
    settings: OneShotSettings,
    *,
    units: Sequence[str] = UNITS,
    round_to: int = 8,
    uniform: bool = False,
    **config: Any,
) -> Goal:
    """What :meth:`OneShotScores.plan` takes, checked before anything is scored.

    Raises:
        UnreachableTargetError: the smallest sizes cost more.
        InvalidConfigError, UnsupportedUnitError, LatencyTableError: impossible settings.
        InvalidPlanError: ``uniform``, and no stock class holds fewer of the units.
    """
    checked = PruningConfig(**config)
    if checked.target is None:
        raise InvalidConfigError("target is needed: the fraction of the cost that may remain")
    if isinstance(units, str) or not units or any(unit not in UNITS for unit in units):
        raise UnsupportedUnitError(f"units of one-shot pruning are a choice of {', '.join(UNITS)}, not {units!r}")
    check_count("round_to", round_to)
    meter = checked.meter(architecture)
    if set(units) != set(UNITS):
        check_units(architecture, units)
    plain = architecture.family.has_plain_qk(architecture.config)
    usable = tuple(u for u in UNITS if u in units and u in architecture.units and (u != "qk" or plain))
    if not usable:
        raise UnsupportedUnitError(f"{architecture.model_type} models turn or normalise queries and keys: no qk here")
    stock = StockSizes(architecture, usable, round_to) if uniform else None
    goal = Goal(checked.target, meter, usable, round_to, settings, stock)
    lowest = meter.ratio(architecture.replace(layers=tuple(_smallest(s, goal) for s in architecture.layers)))
    if lowest > goal.target:
        raise UnreachableTargetError(
            f"a target of {goal.target:.3f} of the {meter.metric} cannot be reached: with the smallest size of every "
            f"branch, {lowest:.3f} remains. Raise the target, lower round_to, or allow more units"
        )
    return goal


def _smallest(shape: LayerShape, goal: Goal) -> LayerShape:
    if goal.stock is not None:
        heads, channels, mlp, _ = goal.stock.smallest()
        return replace(shape, heads=heads, qk_dim=channels, v_dim=channels, mlp=mlp)
    if shape.mixer == "attention":
        qk, v = (goal.settings.ranks(size) for size in (shape.qk_dim, shape.v_dim))
        shape = replace(
            shape,
            heads=1 if "heads" in goal.units else shape.heads,
            qk_dim=min(qk[j] for j in _multiples(qk, goal.round_to, "qk" in goal.units)),
            v_dim=min(v[j] for j in _multiples(v, goal.round_to, "v" in goal.units)),
        )
    return replace(shape, mlp=min(_neurons(shape, goal))) if shape.mlp else shape


def best_plan(
    architecture: Architecture, tensors: Mapping[str, torch.Tensor], settings: OneShotSettings, config: dict[str, Any]
) -> PruningPlan:
    """See :meth:`OneShotScores.plan`."""
    goal = check_target(architecture, settings, **config)
    branches = []
    for i, shape in enumerate(architecture.layers):
        cost = _branch_cost(architecture, goal.meter, i)
        mine = of_layer(tensors, i)
        if shape.mixer == "attention":
            branches.append(_attention(i, shape, mine, goal, cost))
        if shape.mlp:
            branches.append(_mlp(i, shape, mine, goal, cost))
    whole = goal.meter.total(architecture)
    fixed = whole - sum(float(branch.options.costs[0]) for branch in branches)  # outside of what can be cut
    budget = goal.target * whole - fixed
    if goal.stock is None:
        picked, gap = allocate([branch.options for branch in branches], budget)
    else:
        picked, gap = _allocate_alike(branches, goal.stock, budget)
    layers = [LayerPlan.dense(i, shape) for i, shape in enumerate(architecture.layers)]
    for branch, position in zip(branches, picked, strict=True):
        layers[branch.layer] = branch.apply(layers[branch.layer], branch.sizes[position])
    error = sum(float(branch.options.errors[p]) for branch, p in zip(branches, picked, strict=True))
    info = {"method": "OneShot", "target": goal.target, "target_metric": goal.meter.metric, "error": error}
    info |= {"gap": gap, "units": list(goal.units), "round_to": goal.round_to}
    info |= {} if goal.stock is None else {"uniform": True}
    plan = PruningPlan(architecture, tuple(layers), info=info).validated()
    ratio = goal.meter.ratio(plan.architecture)
    say_if_far_under(ratio, goal.target, goal.meter.metric, "Lower round_to, or score more sizes")
    return plan


def _allocate_alike(branches: list[Branch], stock: StockSizes, budget: float) -> tuple[list[int], float]:
    """As :func:`allocate`, with the same sizes for all branches of a kind, of those that a stock class holds."""
    width = stock.whole.embedding
    held = {(h, d, d) for h, d in stock.attention[width]} | {(m,) for m in stock.mlp[width]}
    kinds = [[b for b in branches if len(b.sizes[0]) == length] for length in (3, 1)]
    sizes = [[size for size in kind[0].sizes if size in held] for kind in kinds]
    alike = []
    for kind, row in zip(kinds, sizes, strict=True):
        places = [[branch.sizes.index(size) for size in row] for branch in kind]
        costs = sum(branch.options.costs[place] for branch, place in zip(kind, places, strict=True))
        errors = sum(branch.options.errors[place] for branch, place in zip(kind, places, strict=True))
        alike.append(Options(np.asarray(costs), np.asarray(errors)))
    picked, gap = allocate(alike, budget)
    chosen = {len(row[p]): row[p] for row, p in zip(sizes, picked, strict=True)}
    return [branch.sizes.index(chosen[len(branch.sizes[0])]) for branch in branches], gap


def _branch_cost(architecture: Architecture, meter: CostMeter, layer: int) -> Callable[..., float]:
    """Cost of a layer with one branch of some sizes, over that of the layer with none: layers add up from these."""
    shape, width, kind = architecture.layers[layer], architecture.width(layer), architecture.kinds[layer]
    empty = LayerShape("none", shifted=shape.shifted)
    nothing = meter.layer(empty, width, kind)

    def cost(*sizes: int) -> float:
        if len(sizes) == 1:
            branch = replace(empty, mlp=sizes[0], mlp_in=shape.mlp_in)
        else:
            heads, qk, v = sizes
            branch = LayerShape("attention", heads, qk, v, 0, shape.attention_in, shifted=shape.shifted)
        return meter.layer(branch, width, kind) - nothing

    return cost


def _multiples(sizes: Sequence[int], round_to: int, free: bool) -> list[int]:
    """Positions of the sizes that may be kept, all of them (the last) first."""
    last = len(sizes) - 1
    return [last, *(j for j in range(last) if free and sizes[j] % round_to == 0)]


def _neurons(shape: LayerShape, goal: Goal) -> list[int]:
    """Numbers of neurons that may be kept, all of them first."""
    last = (shape.mlp - 1) // goal.round_to * goal.round_to
    return [shape.mlp, *(range(last, 0, -goal.round_to) if "mlp" in goal.units else ())]


def _attention(
    layer: int, shape: LayerShape, scores: Mapping[str, torch.Tensor], goal: Goal, cost: Callable[..., float]
) -> Branch:
    """Heads, q/k and v channels of a layer, jointly: their costs multiply."""
    order = scores["heads"].tolist()
    v_ranks, qk_ranks = goal.settings.ranks(shape.v_dim), goal.settings.ranks(shape.qk_dim)
    queries = scores.get("queries", torch.zeros(len(qk_ranks), shape.heads))
    values = at_output(scores["values"], scores["values_seen"])
    sizes, costs, errors = [], [], []
    for heads in range(shape.heads, 0, -1) if "heads" in goal.units else [shape.heads]:
        products = queries[:, order[shape.heads - heads :]].sum(1)
        if "queries" in scores:
            products = at_output(products, scores["queries_seen"])
        for q in _multiples(qk_ranks, goal.round_to, "qk" in goal.units):
            for v in _multiples(v_ranks, goal.round_to, "v" in goal.units):
                sizes.append((heads, qk_ranks[q], v_ranks[v]))
                costs.append(cost(*sizes[-1]))
                errors.append(float(values[heads - 1, v] + products[q]))

    def strongest(name: str, size: int) -> tuple[tuple[int, ...], ...]:
        """The channels of every head that matter most as they are; a compensated model has others in their place."""
        if name not in scores:  # all are kept
            return tuple(tuple(range(size)) for _ in range(shape.heads))
        return tuple(tuple(sorted(row)) for row in scores[name].topk(size).indices.tolist())

    def apply(entry: LayerPlan, chosen: tuple[int, ...]) -> LayerPlan:
        heads, qk, v = chosen
        entry = replace(entry, qk=strongest("qk", qk), v=strongest("v", v))
        return entry.keep_heads(order[shape.heads - heads :])

    return Branch(layer, sizes, Options(np.array(costs), np.array(errors)), apply)


def _mlp(
    layer: int, shape: LayerShape, scores: Mapping[str, torch.Tensor], goal: Goal, cost: Callable[..., float]
) -> Branch:
    order = scores["neurons"].tolist()
    lost = at_output(scores["neuron_errors"], scores["neurons_seen"])
    kept = _neurons(shape, goal)

    def apply(entry: LayerPlan, chosen: tuple[int, ...]) -> LayerPlan:
        return replace(entry, mlp=tuple(sorted(order[shape.mlp - chosen[0] :])))

    errors = lost[shape.mlp - torch.tensor(kept)].numpy()
    options = Options(np.array([cost(size) for size in kept]), errors)
    return Branch(layer, [(size,) for size in kept], options, apply)


def at_output(errors: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Relative squared errors of the output for squared errors of a branch, from (n, 2) of both that were seen.

    Between the measured ones, and beyond the largest, a power law; below the smallest, proportional; 0 stays 0.
    """
    x, y = np.array(sorted((a, b) for a, b in seen.tolist() if a > 0 and b > 0)).reshape(-1, 2).T
    if not len(x):
        return errors.double() * 0
    x, y = np.log(x), np.log(np.maximum.accumulate(y))
    wanted = np.log(errors.double().clamp(min=1e-300).numpy())
    found = np.interp(wanted, x, y)
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2]) if len(x) > 1 and x[-1] > x[-2] else 1.0
    found = np.where(wanted > x[-1], y[-1] + slope * (wanted - x[-1]), found)
    found = np.where(wanted < x[0], y[0] + wanted - x[0], found)
    return torch.where(errors > 0, torch.from_numpy(np.exp(found)), 0.0)
