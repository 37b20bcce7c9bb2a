"""New weights for any plan from stored statistics: the folds of every branch, without images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...compensate.algebra import qk_maps
from ...compensate.moments import Statistics
from ...errors import InvalidPlanError
from ...modeling.structure import get, layer_paths
from ...plan.layer_plan import LayerPlan
from ...plan.plan import PruningPlan
from ...spec.layer_shape import LayerShape
from ...surgery.transplant import check_plan, empty_like
from .folds import Branch, neurons_left, value_basis, value_map_of, values_left
from .settings import OneShotSettings


def rebuilt(
    model: Any, plan: PruningPlan, tensors: Mapping[str, torch.Tensor], settings: OneShotSettings
) -> PruningPlan:
    """See :meth:`OneShotScores.compensate`."""
    check_plan(model, plan, allow_unchanged=True)
    _check(plan)
    names = layer_paths(empty_like(model, plan), plan.architecture)
    paths = layer_paths(model, plan.source)
    weights: dict[str, torch.Tensor] = {}
    for entry, small in zip(plan.layers, names, strict=True):
        mine = {name.partition(".")[2]: t for name, t in tensors.items() if name.partition(".")[0] == str(entry.index)}
        layer = Rebuilt(model, paths[entry.index], small, mine, settings.ridge)
        shape = plan.source.layers[entry.index]
        if entry.mixer == "attention":
            layer.attention(entry, shape)
        if len(entry.mlp) < shape.mlp:
            layer.mlp(entry)
        weights |= layer.weights
    info = {**plan.info, "compensation": {"from": "statistics", "ridge": settings.ridge}}
    return replace(plan, weights=weights, info=info)


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


class Rebuilt:
    """New weights of one layer, by their names in the small model."""

    def __init__(self, model: Any, paths: Any, names: Any, tensors: Mapping[str, torch.Tensor], ridge: float) -> None:
        self.model, self.paths, self.names, self.tensors, self.ridge = model, paths, names, tensors, ridge
        self.weights: dict[str, torch.Tensor] = {}

    def _linear(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        linear: Any = get(self.model, path)
        weight = linear.weight.detach().double()
        return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double()

    def _write(self, path: str, name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        old: Any = get(self.model, path)
        self.weights[f"{name}.weight"] = weight.to(old.weight)
        if old.bias is not None:
            self.weights[f"{name}.bias"] = bias.to(old.bias)

    def _branch(self, path: str, scale: str | None, name: str) -> Branch:
        weight, bias = self._linear(path)
        factors: Any = None if scale is None else get(self.model, scale)
        mean, packed = (self.tensors[f"{name}_{part}"].to(weight) for part in ("mean", "cov"))
        rows, columns = torch.tril_indices(len(mean), len(mean), device=weight.device)
        cov = weight.new_zeros(len(mean), len(mean))
        cov[rows, columns] = cov[columns, rows] = packed
        none = weight.new_zeros(0)
        stats = Statistics(float(self.tensors[f"{name}_rows"]), mean, none, cov, weight.new_zeros(0, len(mean)), none)
        return Branch.of(stats, weight, bias, None if factors is None else factors.lambda1.detach().to(weight))

    def attention(self, entry: LayerPlan, shape: LayerShape) -> None:
        heads, width = list(entry.heads), len(entry.qk[0])
        if width < shape.qk_dim and "query_key" in self.tensors:
            moments = [self.tensors["query_key"][:, h].double() for h in heads]
            maps = [qk_maps(q, k, width) for q, k in moments]
            for which, part in enumerate(("q", "k")):
                path = getattr(self.paths, part)
                weight, bias = self._linear(path)
                rows = [slice(h * shape.qk_dim, (h + 1) * shape.qk_dim) for h in heads]
                new = [pair[which].to(weight) for pair in maps]
                self._write(
                    path,
                    getattr(self.names, part),
                    torch.cat([m @ weight[at] for m, at in zip(new, rows, strict=True)]),
                    torch.cat([m @ bias[at] for m, at in zip(new, rows, strict=True)]),
                )
        rank = len(entry.v[0])
        if rank == shape.v_dim and len(heads) == shape.heads:
            return
        branch = self._branch(self.paths.o, self.paths.scale1, "context")
        basis = value_basis(branch, shape.heads)
        down = value_map_of(basis, heads, rank)
        weight, bias = self._linear(self.paths.v)
        self._write(self.paths.v, self.names.v, down @ weight, down @ bias)
        fit = values_left(branch, basis, heads, rank, self.ridge)
        self._write(self.paths.o, self.names.o, fit.weight, fit.bias)

    def mlp(self, entry: LayerPlan) -> None:
        branch = self._branch(self.paths.fc2, self.paths.scale2, "hidden")
        fit = neurons_left(branch, list(entry.mlp), self.ridge)
        self._write(self.paths.fc2, self.names.fc2, fit.weight, fit.bias)
