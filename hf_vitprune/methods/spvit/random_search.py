"""Architectures of SPViT's search space at random, all of one cost: the paper's other baseline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...cost.meter import ClosedFormMeter
from ...errors import UnreachableTargetError
from ...modeling.structure import layer_paths
from ...plan.plan import PruningPlan
from ...spec.architecture import Architecture, unwrap
from ...spec.layer_shape import KERNELS
from .branches import SharedBranches
from .build import attention_of
from .gates import LEVELS


def random_plan(
    model: Any,
    target: float,
    *,
    seed: int,
    metric: str = "macs",
    image_size: int | tuple[int, int] | None = None,
    round_to: int = 8,
) -> PruningPlan:
    """One random architecture of the search space, whose cost is just under the target.

    Every layer's mixer is drawn evenly from the four kinds, and draws repeat until neurons can make up the rest; the
    neurons that go are drawn evenly from all layers. Convolutions mix the heads alike, as before a search.

    Args:
        model: the model to prune, stock or pruned.
        target: fraction of its cost that may remain.
        seed: of the draw.
        metric: what ``target`` counts: ``macs`` or ``params``.
        image_size: at which multiply-adds are counted; the model's own by default.
        round_to: neurons of an MLP are a multiple of this.

    Raises:
        UnreachableTargetError: a thousand draws gave no architecture of this cost.
    """
    model = unwrap(model)
    source = Architecture.of(model)
    meter = ClosedFormMeter(metric, source, image_size)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        plan = _with_random_mixers(PruningPlan.dense(source), generator)
        order = torch.rand(sum(len(entry.mlp) for entry in plan.layers), generator=generator)
        if (
            meter.ratio(_without_neurons(plan, order, len(order), 1).architecture)
            <= target
            < meter.ratio(plan.architecture)
        ):
            plan = _cut_to(plan, order, target, meter, round_to)
            return replace(plan, weights=_uniform_weights(model, plan), info={"method": "random search"}).validated()
    raise UnreachableTargetError(f"no random architecture has {target:.3f} of the {metric}: raise the target")


def _with_random_mixers(plan: PruningPlan, generator: torch.Generator) -> PruningPlan:
    layers = []
    for entry in plan.layers:
        shape = plan.source.layers[entry.index]
        kind = LEVELS[int(torch.randint(len(LEVELS), (), generator=generator))]
        if shape.mixer == "attention" and kind != "attention":
            entry = entry.with_mixer(kind, shape.v_dim if kind in KERNELS else None)
        layers.append(entry)
    return plan.with_layers(layers)


def _without_neurons(plan: PruningPlan, order: torch.Tensor, dropped: int, round_to: int) -> PruningPlan:
    """Without the ``dropped`` first neurons in the order of all layers; counts rounded."""
    threshold = torch.inf if dropped == len(order) else float(order.sort().values[dropped])
    layers, start = [], 0
    for entry in plan.layers:
        own = order[start : start + len(entry.mlp)]
        start += len(entry.mlp)
        count = int((own >= threshold).sum())
        if count < len(own):
            count = min(round(count / round_to) * round_to, len(own))
        chosen = own.argsort(descending=True)[:count].sort().values.tolist()
        kept = tuple(entry.mlp[j] for j in chosen)
        layers.append(replace(entry, mlp=kept, mlp_in=entry.mlp_in if kept else None))
    return plan.with_layers(layers)


def _cut_to(
    plan: PruningPlan, order: torch.Tensor, target: float, meter: ClosedFormMeter, round_to: int
) -> PruningPlan:
    low, high = 0, len(order)  # cost(low) > target >= cost(high)
    while high - low > 1:
        middle = (low + high) // 2
        if meter.ratio(_without_neurons(plan, order, middle, round_to).architecture) > target:
            low = middle
        else:
            high = middle
    return _without_neurons(plan, order, high, round_to)


@torch.no_grad()
def _uniform_weights(model: Any, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """Convolutions of all heads alike."""
    weights: dict[str, torch.Tensor] = {}
    for entry, paths in zip(plan.layers, layer_paths(model, plan.source), strict=True):
        shape = plan.source.layers[entry.index]
        if entry.mixer in KERNELS and entry.replaces_mixer(shape):
            attention = attention_of(model, plan.source, entry.index, paths)
            branches = SharedBranches(shape.heads, shape.v_dim, 1.0, next(model.parameters()).device)
            made = branches.weights(entry.mixer, attention)
            weights |= {f"{paths.attention}.{name}": tensor for name, tensor in made.items()}
    return weights
