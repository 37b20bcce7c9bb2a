"""One pass of images through a model, layer by layer: statistics of every branch, errors of every size of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...compensate.algebra import obs, qk_maps, roots
from ...compensate.fits import Projection
from ...compensate.layer import Layer
from ...compensate.moments import HeadMoments, Moments, Statistics
from ...compensate.streams import token_weights
from ...compensate.walk import Walk
from ...spec.architecture import Architecture
from ...spec.layer_shape import LayerShape
from ...utils.batches import ImageBatches
from ...utils.processes import shard, shared_tensors
from .folds import neurons_left, packed, value_errors, values_left
from .probe import Changes, Probe
from .settings import OneShotSettings

#: probe images times layers of the model at the most: each layer has its probes, and they run through all above it
PROBED = 48


class Sums(NamedTuple):
    """What a pass finds of a layer: moments of what ``o`` and ``fc2`` read, and second moments of ``q`` and ``k``."""

    branches: dict[str, Statistics]
    heads: dict[str, torch.Tensor]


class Measurement:
    """The pass. With several processes, each has a part of the images and owns every so many-th layer.

    An owner gets the sums of its layer from all, solves it while the others solve theirs, and sends what it found.
    """

    def __init__(self, model: PreTrainedModel, batches: ImageBatches, settings: OneShotSettings) -> None:
        self.architecture = Architecture.of(model)
        self.settings = settings
        self.walk = Walk(model, self.architecture, batches)
        self.hidden = [self.walk.start(batch) for batch in batches]
        probed = max(1, min(settings.probe_images, PROBED // len(self.walk.layers)))
        few = next(iter(ImageBatches(batches, probed, probed)))
        self.probe = Probe(self.walk, few)
        self.tensors: dict[str, torch.Tensor] = {}
        self._probed: list[tuple[str, float]] = []  # name of a tensor, and the error of the branch

    def run(self) -> dict[str, torch.Tensor]:
        rank, processes = shard()
        layers = range(len(self.walk.layers))
        bar = tqdm(total=len(layers), desc="scoring", delay=3, disable=rank > 0)
        for start in layers[::processes]:
            turn = layers[start : start + processes]
            own: dict[int, Sums] = {}
            for i in turn:
                sums = self._pass(i, i % processes)
                if i % processes == rank:
                    own[i] = sums
            for i in turn:
                if i in own:
                    self._solve(i, own.pop(i))
                self.probe.advance(i)
                bar.update()
        bar.close()
        self.tensors = shared_tensors(self.tensors, self.walk.device)
        return self.tensors

    def _solve(self, index: int, sums: Sums) -> None:
        layer, shape = self.walk.layers[index], self.architecture.layers[index]
        with layer.present():
            if shape.mixer == "attention":
                self._attention(index, layer, shape, sums.branches["o"])
                if sums.heads:
                    self._query_key(index, layer, shape, torch.stack([sums.heads["q"], sums.heads["k"]]))
            if shape.mlp:
                self._mlp(index, layer, sums.branches["fc2"])
        seen: dict[str, list[list[float]]] = {}
        for (name, lost), error in zip(self._probed, self.probe.errors(index), strict=True):
            seen.setdefault(name, []).append([lost, error])
        self._probed = []
        self._keep(index, **{name: torch.tensor(rows).double() for name, rows in seen.items()})

    # ------------------------------------------------------------------ statistics
    def _pass(self, index: int, owner: int) -> Sums:
        """Moments of queries and keys and of what the last Linears of the branches read; the stream goes on."""
        layer, shape, stages = self.walk.layers[index], self.architecture.layers[index], self.architecture.stages
        for below in range(stages[index - 1] if index else 0, stages[index]):
            self.hidden = [self.walk.bridge(below, hidden) for hidden in self.hidden]
        device = self.walk.device
        sizes = {"o": shape.heads * shape.v_dim if shape.mixer == "attention" else 0, "fc2": shape.mlp}
        moments = {part: Moments(size, 0, device) for part, size in sizes.items() if size}
        plain = shape.mixer == "attention" and self.architecture.family.has_plain_qk(self.architecture.config)
        heads = {part: HeadMoments(shape.heads, shape.qk_dim, device) for part in ("q", "k") if plain}
        for b, hidden in enumerate(self.hidden):
            trace = layer.trace(hidden)
            tokens = token_weights(self.architecture, self.settings.token_share, hidden)
            for part, sums in moments.items():
                x = trace[part]
                sums.add(x.flatten(0, 1), x.new_zeros(x.shape[:2].numel(), 0), tokens)
            for part, products in heads.items():
                x = trace[part]
                weights = tokens if x.shape[:2] == hidden.shape[:2] else x.new_ones(x.shape[:2].numel())
                if part == "k":  # softmax does not see what all keys of a query have in common
                    x, weights = x - x.mean(1, keepdim=True), torch.ones_like(weights)
                products.add(x, weights)
            self.hidden[b] = trace["out"]
        return Sums(
            {part: sums.total(layer.part(part).bias is not None, owner) for part, sums in moments.items()},
            {part: products.total(owner) for part, products in heads.items()},
        )

    def _probe(self, layer: int, name: str, lost: torch.Tensor, changes: Changes) -> None:
        """See what a change of a layer, by which its branch loses ``lost``, does to the output."""
        self.probe.change(layer, changes)
        self._probed.append((f"{name}_seen", float(lost)))

    def _keep(self, layer: int, **tensors: torch.Tensor) -> None:
        self.tensors |= {f"{layer}.{name}": tensor.detach().to("cpu") for name, tensor in tensors.items()}

    # ------------------------------------------------------------------ branches
    def _attention(self, index: int, layer: Layer, shape: LayerShape, stats: Statistics) -> None:
        ridge, size, heads = self.settings.ridge, shape.v_dim, list(range(shape.heads))
        branch = layer.branch("o", stats)
        gone, _ = obs(branch.effect, branch.stats.xx, 1, size, ridge)
        order = gone.tolist() + sorted({*heads} - {*gone.tolist()})
        ranks = self.settings.ranks(size)
        errors = value_errors(branch, order, size, ranks, ridge)
        for j in probed(len(ranks)):
            down, fit = values_left(branch, heads, size, ranks[j], ridge)
            self._probe(index, "values", errors[-1, j], {"o": (fit.weight @ down, fit.bias)})
        strength = (branch.effect.square().sum(0) * branch.stats.xx.diagonal()).view(shape.heads, -1)
        self._keep(index, heads=torch.tensor(order), values=errors, v=strength)
        if self.settings.statistics:
            self._keep(index, **packed("context", branch.stats))

    def _query_key(self, index: int, layer: Layer, shape: LayerShape, second: torch.Tensor) -> None:
        """What every head's products lose at every rank of ``second``, the moments (2, heads, channels, channels)."""
        size = shape.qk_dim
        query, key = (Projection.of(*layer.weights(part), size) for part in ("q", "k"))
        (rq, _), (rk, _) = roots(second[0]), roots(second[1])
        squares = torch.linalg.svdvals(rq @ rk).square() * self.architecture.scaling(index) ** 2
        left = squares.flip(1).cumsum(1).flip(1)  # what goes when this and all later directions go
        ranks = self.settings.ranks(size)
        lost = torch.stack([left[:, rank] if rank < size else torch.zeros_like(left[:, 0]) for rank in ranks])
        for j in probed(len(ranks)):
            maps = (
                nn.functional.pad(some, (0, 0, 0, size - ranks[j])) for some in qk_maps(second[0], second[1], ranks[j])
            )
            changed = {part: one.through(m) for part, one, m in zip("qk", (query, key), maps, strict=True)}
            self._probe(index, "queries", lost[j].sum(), changed)
        strength = second.diagonal(dim1=2, dim2=3).prod(0)
        self._keep(index, queries=lost, query_key=second.float(), qk=strength)

    def _mlp(self, index: int, layer: Layer, stats: Statistics) -> None:
        branch = layer.branch("fc2", stats)
        size = len(stats.xx)
        gone, found = obs(branch.effect, stats.xx, 1, ridge=self.settings.ridge, block=max(32, size // 16))
        errors = torch.cat([found.new_zeros(1), found])
        order = gone.tolist() + sorted({*range(size)} - {*gone.tolist()})
        for count in (size // 2, size // 16):
            if count:
                kept = sorted(order[size - count :])
                fit = neurons_left(branch, kept, self.settings.ridge)
                weight = torch.zeros_like(branch.weight)
                weight[:, kept] = fit.weight
                self._probe(index, "neurons", errors[size - count], {"fc2": (weight, fit.bias)})
        self._keep(index, neurons=torch.tensor(order), neuron_errors=errors)
        if self.settings.statistics:
            self._keep(index, **packed("hidden", stats))


def probed(count: int) -> list[int]:
    """Positions among ``count`` sizes (the last is all) that are probed: a half and an eighth."""
    return sorted({j for share in (2, 8) if (j := count // share - 1) >= 0} or {0}, reverse=True)
