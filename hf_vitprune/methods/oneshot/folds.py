"""What is left of a branch at smaller sizes, by its statistics alone: its errors, and new weights for any plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...compensate.algebra import balance, nested_errors, qk_maps
from ...compensate.fits import Branch, Fit, Projection, damping
from ...compensate.layer import Layer
from ...compensate.moments import Statistics
from ...errors import InvalidPlanError
from ...families import LayerPaths
from ...modeling.peft_twin import whole_shadow
from ...modeling.structure import layer_paths
from ...plan.layer_plan import LayerPlan
from ...plan.plan import PruningPlan
from ...spec.layer_shape import LayerShape
from ...surgery.transplant import check_fits
from ...utils.modules import get
from ...utils.offload import StateDict, Waiting
from .settings import OneShotSettings

#: of the ridge: fits go three rounds with it, which leaves less of an error than one
ONE_ROUND = 0.03


def values_left(branch: Branch, heads: list[int], size: int, rank: int, ridge: float) -> tuple[torch.Tensor, Fit]:
    """The best ``rank`` channels of some heads, of ``size`` each.

    Returns:
        Map (len(heads) * rank, len(heads) * size) of their contexts, and the output projection that reads it.
    """
    kept = branch.take(columns(heads, size))
    down, start = kept.low_rank(size, [range(j * rank, (j + 1) * rank) for j in range(len(heads))])
    return down, Branch(kept.stats.through(down), start, branch.scale).refit(ridge)


def neurons_left(branch: Branch, kept: list[int], ridge: float) -> Fit:
    """The Linear that reads only some of its inputs."""
    return branch.take(torch.tensor(kept)).refit(ridge)


def value_errors(branch: Branch, order: list[int], size: int, ranks: list[int], ridge: float) -> torch.Tensor:
    """(heads, len(ranks)) squared errors with the last 1, 2, ... heads of an order of removal, at each rank."""
    heads = len(order)
    whole = branch.stats.through(branch.low_rank(size, [range(h * size, (h + 1) * size) for h in range(heads)])[0])
    errors = torch.zeros(heads, len(ranks), dtype=torch.float64)
    for j, rank in enumerate(ranks):
        stats = whole.take(columns(order[::-1], size, rank))
        ridge_here = ONE_ROUND * damping(stats, ridge)
        errors[:, j] = nested_errors(stats.xx, stats.tx, stats.tt.sum(), rank, ridge_here)
    if ranks[-1] == size:
        errors[-1, -1] = 0.0
    return errors


def columns(heads: list[int], size: int, rank: int | None = None) -> torch.Tensor:
    """Places of the first ``rank`` (or all) channels of some heads, among all channels."""
    return torch.tensor([head * size + c for head in heads for c in range(size if rank is None else rank)])


# ---------------------------------------------------------------------- in a file
def packed(name: str, stats: Statistics) -> dict[str, torch.Tensor]:
    """Rows, mean, and the lower triangle of the covariance."""
    rows, cols = torch.tril_indices(len(stats.xx), len(stats.xx))
    cov = stats.xx.cpu()[rows, cols].float()
    return {f"{name}_rows": torch.tensor(stats.rows).double(), f"{name}_mean": stats.x.float(), f"{name}_cov": cov}


def unpacked(name: str, tensors: Mapping[str, torch.Tensor], like: torch.Tensor) -> Statistics:
    """The statistics of inputs alone, of the kind and on the device of another tensor."""
    mean, cov = (tensors[f"{name}_{part}"].to(like) for part in ("mean", "cov"))
    rows, cols = torch.tril_indices(len(mean), len(mean), device=like.device)
    full = like.new_zeros(len(mean), len(mean))
    full[rows, cols] = full[cols, rows] = cov
    none = like.new_zeros(0)
    return Statistics(float(tensors[f"{name}_rows"]), mean, none, full, like.new_zeros(0, len(mean)), none)


# ---------------------------------------------------------------------- new weights
def rebuilt(
    model: Any, plan: PruningPlan, tensors: Mapping[str, torch.Tensor], settings: OneShotSettings
) -> PruningPlan:
    """See :meth:`OneShotScores.compensate`."""
    check_fits(model, plan, allow_unchanged=True)
    _check(plan)
    paths, names = (layer_paths(model, architecture) for architecture in (plan.source, plan.architecture))
    weights: dict[str, torch.Tensor] = {}
    state = StateDict(model)
    for entry, small in zip(plan.layers, names, strict=True):
        path = paths[entry.index].layer
        shadow = whole_shadow(get(model, path))
        layer = Layer(shadow, paths[entry.index], ((), {}), Waiting(state, path, shadow))
        new = _Rebuilt(layer, small, of_layer(tensors, entry.index), settings.ridge)
        shape = plan.source.layers[entry.index]
        with layer.present():
            if entry.mixer == "attention":
                new.attention(entry, shape)
            new.mlp(entry, shape)
        weights |= new.weights
    info = {**plan.info, "compensation": {"from": "statistics", "ridge": settings.ridge}}
    return replace(plan, weights=weights, info=info)


def of_layer(tensors: Mapping[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """What a layer has in the scores, by its name there."""
    return {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == str(layer)}


def _check(plan: PruningPlan) -> None:
    if plan.weights or any(entry.scales for entry in plan.layers):
        raise InvalidPlanError("the plan carries new weights or factors already: compensate the one it was made from")
    source = plan.source
    for entry in plan.layers:
        shape = source.layers[entry.index]
        if entry.mixer != shape.mixer or bool(entry.mlp) != bool(shape.mlp) or entry.attention_in or entry.mlp_in:
            break
    else:
        if plan.embedding is None and len(plan.layers) == len(source.layers):
            return
    raise InvalidPlanError(
        "from statistics alone, heads, q/k and v channels and hidden neurons can be made up for; for layers, "
        "branches, inputs or residual channels prune with calibration=images"
    )


class _Rebuilt:
    """A layer of the model, and new weights by their names in the small one."""

    def __init__(self, layer: Layer, names: LayerPaths, tensors: Mapping[str, torch.Tensor], ridge: float) -> None:
        self.layer, self.names, self.tensors, self.ridge = layer, names, tensors, ridge
        self.weights: dict[str, torch.Tensor] = {}

    def _write(self, part: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        old, name = self.layer.part(part), getattr(self.names, part)
        self.weights[f"{name}.weight"] = weight.to(old.weight)
        if old.bias is not None:
            self.weights[f"{name}.bias"] = bias.to(old.bias)

    def _branch(self, last: str, name: str) -> Branch:
        return self.layer.branch(last, unpacked(name, self.tensors, self.layer.weights(last)[0]))

    def attention(self, entry: LayerPlan, shape: LayerShape) -> None:
        heads, width, rank = list(entry.heads), len(entry.qk[0]), len(entry.v[0])
        if width < shape.qk_dim and "query_key" in self.tensors:  # which families that turn q and k do not have
            second = self.tensors["query_key"].double()[:, heads]
            maps = qk_maps(second[0], second[1], width)
            for part, mix in zip(("q", "k"), maps, strict=True):
                whole = Projection.of(*self.layer.weights(part), shape.qk_dim)
                self._write(part, *Projection(whole.weight[heads], whole.bias[heads]).through(mix.to(whole.weight)))
        if rank < shape.v_dim or len(heads) < shape.heads:
            down, fit = values_left(self._branch("o", "context"), heads, shape.v_dim, rank, self.ridge)
            weight, bias = (tensor[columns(heads, shape.v_dim)] for tensor in self.layer.weights("v"))
            factors = balance(down @ weight, fit.weight)
            self._write("v", factors[:, None] * (down @ weight), factors * (down @ bias))
            self._write("o", fit.weight / factors, fit.bias)

    def mlp(self, entry: LayerPlan, shape: LayerShape) -> None:
        if len(entry.mlp) < shape.mlp:
            fit = neurons_left(self._branch("fc2", "hidden"), list(entry.mlp), self.ridge)
            self._write("fc2", fit.weight, fit.bias)
