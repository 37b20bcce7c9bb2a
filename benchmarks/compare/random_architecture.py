"""Architectures of SPViT's search space at random, all of one cost: the paper's other baseline."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hf_vitprune import Architecture, PruningPlan
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.errors import UnreachableTargetError
from hf_vitprune.methods.spvit.branches import Attention, SharedBranches
from hf_vitprune.methods.spvit.gates import LEVELS
from hf_vitprune.modeling.structure import layer_paths
from hf_vitprune.plan.select import Ranking, best, reach_target, rounded
from hf_vitprune.spec.layer_shape import KERNELS
from hf_vitprune.spec.units import set_name


def random_plan(model: Any, target: float, *, seed: int, round_to: int = 8) -> PruningPlan:
    """One random architecture of the search space, whose multiply-adds are just under a fraction of the model's.

    Every layer's mixer is drawn evenly from the four kinds, and draws repeat until neurons can make up the rest; the
    neurons that go are drawn evenly from all layers. Convolutions mix the heads alike, as before a search.
    """
    source = Architecture.of(model)
    meter = ClosedFormMeter("macs", source)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(1000):
        plan = _with_random_mixers(PruningPlan.dense(source), generator)
        sizes = {set_name("mlp", entry.index): len(entry.mlp) for entry in plan.layers if entry.mlp}
        order = torch.rand(sum(sizes.values()), generator=generator).split(list(sizes.values()))
        ranking = Ranking(dict(zip(sizes, order, strict=True)))
        lowest = _without_neurons(plan, ranking, len(ranking), round_to)
        if meter.ratio(lowest.architecture) <= target < meter.ratio(plan.architecture):
            plan = reach_target(
                partial(_without_neurons, plan, ranking, round_to=round_to), len(ranking), target, meter
            )
            return replace(plan, weights=_uniform_weights(model, plan), info={"method": "random search"}).validated()
    raise UnreachableTargetError(f"no random architecture has {target:.3f} of the macs: raise the target")


def _with_random_mixers(plan: PruningPlan, generator: torch.Generator) -> PruningPlan:
    layers = []
    for entry in plan.layers:
        shape = plan.source.layers[entry.index]
        kind = LEVELS[int(torch.randint(len(LEVELS), (), generator=generator))]
        if shape.mixer == "attention" and kind != "attention":
            entry = entry.with_mixer(kind, shape.v_dim if kind in KERNELS else None)
        layers.append(entry)
    return plan.with_layers(layers)


def _without_neurons(plan: PruningPlan, ranking: Ranking, dropped: int, round_to: int) -> PruningPlan:
    """Without the ``dropped`` first neurons in the order of all layers; counts rounded, down to none."""
    kept = ranking.kept(dropped)
    layers = []
    for entry in plan.layers:
        name = set_name("mlp", entry.index)
        if name in kept:
            size, count = len(kept[name]), int(kept[name].sum())
            count = count if count == size else rounded(count, size, round_to, least=0)
            mlp = tuple(entry.mlp[j] for j in best(ranking.keys[name], count))
            entry = replace(entry, mlp=mlp, mlp_in=entry.mlp_in if mlp else None)
        layers.append(entry)
    return plan.with_layers(layers)


@torch.no_grad()
def _uniform_weights(model: Any, plan: PruningPlan) -> dict[str, torch.Tensor]:
    """Convolutions of all heads alike."""
    weights: dict[str, torch.Tensor] = {}
    for entry, paths in zip(plan.layers, layer_paths(model, plan.source), strict=True):
        shape = plan.source.layers[entry.index]
        if entry.mixer in KERNELS and entry.replaces_mixer(shape):
            attention = Attention.of(model, plan.source, entry.index, paths)
            branches = SharedBranches(plan.source, entry.index, next(model.parameters()))
            made = branches.weights(entry.mixer, attention)
            weights |= {f"{paths.attention}.{name}": tensor for name, tensor in made.items()}
    return weights
