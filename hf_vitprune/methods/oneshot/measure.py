"""One pass of images through a model, layer by layer: statistics of every branch, errors of every size of it."""

from __future__ import annotations

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...compensate.algebra import obs, qk_maps, roots
from ...compensate.moments import Moments, Statistics, precise_device
from ...compensate.streams import token_weights
from ...compensate.walk import Layer, Walk
from ...spec.architecture import Architecture
from ...spec.layer_shape import LayerShape
from ...utils.batches import ImageBatches
from .folds import Branch, neurons_left, value_basis, value_errors, value_map_of, values_left
from .probe import Probe
from .settings import OneShotSettings


class Measurement:
    """The pass.

    Attributes:
        tensors: what :class:`OneShotScores` holds.
    """

    def __init__(self, model: PreTrainedModel, batches: ImageBatches, settings: OneShotSettings) -> None:
        self.architecture = Architecture.of(model)
        self.settings = settings
        self.walk = Walk(model, self.architecture, next(iter(batches)))
        self.device = precise_device(self.walk.first.device)
        self.hidden = [self.walk.start(batch) for batch in batches]
        few = next(iter(ImageBatches(batches, settings.probe_images, settings.probe_images)))
        self.probe = Probe(self.walk, few)
        self.tensors: dict[str, torch.Tensor] = {}

    def run(self) -> dict[str, torch.Tensor]:
        stages, shapes = self.architecture.stages, self.architecture.layers
        for i, (layer, shape) in enumerate(zip(tqdm(self.walk.layers, "scoring", delay=3), shapes, strict=True)):
            for below in range(stages[i - 1] if i else 0, stages[i]):
                self.hidden = [self.walk.bridge(below, hidden) for hidden in self.hidden]
            moments = self._pass(layer, shape)
            if shape.mixer == "attention":
                self._attention(i, layer, shape, moments)
            if shape.mlp:
                self._mlp(i, layer, moments["fc2"])
            self.probe.advance(i)
        return self.tensors

    # ------------------------------------------------------------------ statistics
    def _pass(self, layer: Layer, shape: LayerShape) -> dict[str, Statistics]:
        """Moments of what q and k read and of what the last Linears of the branches read; the stream goes on."""
        parts = {}
        if shape.mixer == "attention":
            width = layer.part("q").in_features
            parts = {"q": width, "k": width, "o": shape.heads * shape.v_dim}
        if shape.mlp:
            parts["fc2"] = shape.mlp
        moments = {part: Moments(size, 0, self.walk.first.device) for part, size in parts.items()}
        for b, hidden in enumerate(self.hidden):
            trace = layer.trace(hidden)
            tokens = token_weights(self.architecture, self.settings.token_share, hidden)
            for part, sums in moments.items():
                x = trace["q" if part == "k" else part]
                weights = tokens if x.shape[:2] == hidden.shape[:2] else x.new_ones(x.shape[:2].numel())
                if part == "k":  # softmax does not see what all keys of a query have in common
                    x, weights = x - x.mean(1, keepdim=True), torch.ones_like(weights)
                sums.add(x.flatten(0, 1), x.new_zeros(x.shape[:2].numel(), 0), weights)
            self.hidden[b] = trace["out"]
        return {part: sums.total(part != "k" and layer.part(part).bias is not None) for part, sums in moments.items()}

    def _branch(self, layer: Layer, part: str, scale: str, stats: Statistics) -> Branch:
        weight, bias = self._linear(layer, part)
        factors = layer.part(scale).lambda1.detach().to(weight) if scale in layer.paths else None
        return Branch.of(stats, weight, bias, factors)

    def _linear(self, layer: Layer, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        linear: nn.Linear = layer.part(part)
        weight = linear.weight.detach().to(self.device, torch.float64)
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().to(weight)
        return weight, bias

    def _keep(self, layer: int, **tensors: torch.Tensor) -> None:
        self.tensors |= {f"{layer}.{name}": tensor.detach().to("cpu") for name, tensor in tensors.items()}

    # ------------------------------------------------------------------ branches
    def _attention(self, index: int, layer: Layer, shape: LayerShape, moments: dict[str, Statistics]) -> None:
        ridge, heads = self.settings.ridge, list(range(shape.heads))
        branch = self._branch(layer, "o", "scale1", moments["o"])
        gone, _ = obs(branch.effect, branch.stats.xx, 1, shape.v_dim, ridge)
        order = gone.tolist() + sorted({*heads} - {*gone.tolist()})
        basis = value_basis(branch, shape.heads)
        ranks = self.settings.ranks(shape.v_dim)
        errors = value_errors(branch, basis, order, ranks, ridge)
        seen = []
        for j in probed(len(ranks)):
            fit = values_left(branch, basis, heads, ranks[j], ridge)
            weight = fit.weight @ value_map_of(basis, heads, ranks[j])
            seen.append([float(errors[-1, j]), self.probe.error(index, {"o": (weight, fit.bias)})])
        strength = (branch.effect.square().sum(0) * branch.stats.xx.diagonal()).view(shape.heads, -1)
        self._keep(
            index, heads=torch.tensor(order), values=errors, values_seen=torch.tensor(seen).double(), v=strength
        )
        if self.settings.statistics:
            self._keep(
                index, context_rows=torch.tensor(branch.stats.rows).double(), **_packed("context", branch.stats)
            )
        if self.architecture.family.plain_qk:
            self._query_key(index, layer, shape, moments)

    def _query_key(self, index: int, layer: Layer, shape: LayerShape, moments: dict[str, Statistics]) -> None:
        """Second moments of queries and keys, and what every head's products lose at every rank of them."""
        size, heads = shape.qk_dim, shape.heads
        linears = {part: self._linear(layer, part) for part in ("q", "k")}
        second = torch.zeros(2, heads, size, size, dtype=torch.float64, device=self.device)
        for which, (part, (weight, bias)) in enumerate(linears.items()):
            stats = moments[part]
            for h in range(heads):
                at = slice(h * size, (h + 1) * size)
                second[which, h] = weight[at] @ stats.xx @ weight[at].T
                if part == "q":
                    mean = weight[at] @ stats.x + bias[at]
                    second[which, h] += torch.outer(mean, mean)
        (rq, _), (rk, _) = roots(second[0]), roots(second[1])
        squares = torch.linalg.svdvals(rq @ rk).square() * self.architecture.scaling(index) ** 2
        left = squares.flip(1).cumsum(1).flip(1)  # what goes when this and all later directions go
        ranks = self.settings.ranks(size)
        lost = torch.stack([left[:, rank] if rank < size else left.new_zeros(heads) for rank in ranks])
        seen = []
        for j in probed(len(ranks)):
            maps = second.new_zeros(2, heads * size, heads * size)
            for h in range(heads):
                at = slice(h * size, (h + 1) * size)
                maps[0, at, at][: ranks[j]], maps[1, at, at][: ranks[j]] = qk_maps(
                    second[0, h], second[1, h], ranks[j]
                )
            changed = {part: (m @ w, m @ b) for m, (part, (w, b)) in zip(maps, linears.items(), strict=True)}
            seen.append([float(lost[j].sum()), self.probe.error(index, changed)])
        strength = second.diagonal(dim1=2, dim2=3).prod(0)
        self._keep(
            index, queries=lost, queries_seen=torch.tensor(seen).double(), query_key=second.float(), qk=strength
        )

    def _mlp(self, index: int, layer: Layer, stats: Statistics) -> None:
        branch = self._branch(layer, "fc2", "scale2", stats)
        size = len(stats.xx)
        gone, found = obs(branch.effect, stats.xx, 1, ridge=self.settings.ridge, block=max(32, size // 16))
        errors = torch.cat([found.new_zeros(1), found])
        order = gone.tolist() + sorted({*range(size)} - {*gone.tolist()})
        seen = []
        for kept in (size // 2, size // 16):
            if kept:
                fit = neurons_left(branch, sorted(order[size - kept :]), self.settings.ridge)
                weight = torch.zeros_like(branch.weight)
                weight[:, sorted(order[size - kept :])] = fit.weight
                seen.append([float(errors[size - kept]), self.probe.error(index, {"fc2": (weight, fit.bias)})])
        seen_tensor = torch.tensor(seen).double()
        self._keep(index, neurons=torch.tensor(order), neuron_errors=errors, neurons_seen=seen_tensor)
        if self.settings.statistics:
            self._keep(index, hidden_rows=torch.tensor(stats.rows).double(), **_packed("hidden", stats))


def probed(count: int) -> list[int]:
    """Positions among ``count`` sizes (the last is all) that are probed: a half and an eighth."""
    return sorted({j for share in (2, 8) if (j := count // share - 1) >= 0} or {0}, reverse=True)


def _packed(name: str, stats: Statistics) -> dict[str, torch.Tensor]:
    """Mean, and the lower triangle of the covariance."""
    rows, columns = torch.tril_indices(len(stats.xx), len(stats.xx))
    return {f"{name}_mean": stats.x.float(), f"{name}_cov": stats.xx.cpu()[rows, columns].float()}
